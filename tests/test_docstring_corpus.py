"""tools/build_docstring_corpus.py: which docstrings it takes, in which order."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "build_docstring_corpus.py"

LONG = "Explain the thing at length. " * 10
OTHER = "Another text, long enough to be kept: " + "word " * 60


@pytest.fixture
def site_packages(tmp_path):
    """Two packages, a single module, and what has to be passed over."""
    files = {
        "beta/__init__.py": f'"""{LONG}"""\nraise SystemExit("never imported")\n',
        "alpha/core.py": (f'class A:\n    """{OTHER}\n\n    Args:\n        x: y\n    """\n'
                          f'    def method(self):\n        r"""{LONG} method \\d"""\n'
                          f'if True:\n    try:\n        pass\n    except E:\n        async def f():\n'
                          f'            "{LONG} f"\n'
                          f'            def inner():\n                "{LONG} inner"\n'),
        "alpha/again.py": f'def same():\n    """{LONG}"""\n',
        "alpha/short.py": '"""Too short."""\n',
        "alpha/broken.py": "def (:\n",
        "alpha/latin.py": b'# -*- coding: latin-1 -*-\n"""' + ("caf\xe9 " * 60).encode("latin-1") + b'"""\n',
        "alpha/half.py": '"""' + "\\ud800" + LONG + '"""\n',
        "single.py": f'"""{LONG} single"""\n',
        "megatron_encdec/own.py": f'"""{LONG} own"""\n',
        "x-1.0.dist-info/y.py": f'"""{LONG} info"""\n',
        "__editable___x_finder.py": f'"""{LONG} finder"""\n',
    }
    for name, content in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / "site"


def build(output, root, workers=1):
    return subprocess.run([sys.executable, TOOL, output, "--site-packages", root, "--workers", str(workers)],
                          capture_output=True, text=True)


def test_finds_the_long_docstrings_in_file_order(site_packages, tmp_path):
    done = build(tmp_path / "docs.jsonl", site_packages)
    lines = [json.loads(line) for line in (tmp_path / "docs.jsonl").read_text("utf-8").splitlines()]
    assert [(line["source"], line["library"]) for line in lines] == [
        ("alpha/again.py:same", "alpha"), ("alpha/core.py:A", "alpha"), ("alpha/core.py:A.method", "alpha"),
        ("alpha/core.py:f", "alpha"), ("alpha/core.py:f.inner", "alpha"), ("alpha/latin.py", "alpha"),
        ("single.py", "single")]
    assert lines[1]["text"].endswith("\n\nArgs:\n    x: y")
    assert lines[5]["text"].startswith("café café")
    characters = sum(len(line["text"]) for line in lines)
    assert f"7 docstrings, {characters:,} characters, from 8 files (1 not readable, 1 repeats dropped)" in done.stdout


def test_same_bytes_for_any_number_of_workers(tmp_path):
    """On the test tool's own package: enough files for several batches."""
    root = Path(sysconfig.get_path("purelib"), "_pytest")
    for workers in (1, 2):
        assert build(tmp_path / f"{workers}.jsonl", root, workers).returncode == 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert (tmp_path / "1.jsonl").stat().st_size > 10_000


def test_refuses_places_without_docstrings(tmp_path):
    for root, said in ((tmp_path / "absent", "absent: no such directory"),
                       (tmp_path, "no docstring longer than 200 characters in its 0 files")):
        done = build(tmp_path / "docs.jsonl", root)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
