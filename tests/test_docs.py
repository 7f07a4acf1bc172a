"""The documentation is true: its code runs or parses, its links lead somewhere, its page of keys is the code's.

    1. blocks of bash: the shell parses them, every `megatron-encdec` line is parsed by the verb's own parser, a config
       that is named is planned (--dry-run); files that are named are there
    2. blocks of YAML: a config or a part of one builds
    3. blocks of Python: those that need only an encoder run
    4. links and anchors; docs/config.md; the site, built by zensical in strict mode
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml
from random_models import save
from small_run import run_cli, workspace

from megatron_encdec.cli import VERBS, _parse, main, parser_of
from megatron_encdec.finetune.config import NegativesConfig
from megatron_encdec.model.config import PRESETS
from megatron_encdec.platform import schema
from megatron_encdec.platform.optional import is_available
from megatron_encdec.training.config import Config, load_config
from megatron_encdec.training.layout import lay_out

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Words of a command that a reader puts in: a config, folders.
BASE = {"run": {"dir": "runs/any"}, "tokenizer": {"path": "nowhere/tokenizer"},
        "data": {"train": [{"path": "nowhere/text"}], "sequence_length": 1024}, "model": {"preset": "210m"},
        "phases": [{"name": "mlm", "objective": "mlm", "tokens": 300e9}]}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [Block(page.name, text.count("\n", 0, match.start()) + 1, match[1], match[2])
                  for match in FENCE.finditer(text)]
    return [block for block in found if block.language == language]


def commands(block: Block) -> list[list[str]]:
    """The words of each command, comments and continued lines apart."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of_ours(words: list[str]) -> list[str] | None:
    """What stands behind `megatron-encdec` or `python -m megatron_encdec`, whatever starts it; None for others."""
    if words[0] == "docker":  # an image of that name
        return None
    names = [name for name in ("megatron-encdec", "megatron_encdec") if name in words]
    return words[words.index(names[0]) + 1:] if names else None


OURS = [pytest.param(words, id=f"{block}: {' '.join(words)[:60]}") for block in blocks("bash")
        for line in commands(block) if (words := of_ours(line))]


def test_every_language_is_one_that_is_checked():
    known = {"bash", "yaml", "python", ""}
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {match[1] for match in FENCE.finditer(text)} <= known
    assert text.count("\n```") == 2 * len(FENCE.findall(text))  # each fence is one of a pair
    command = re.compile(r"^\$? ?(megatron-encdec \w|bash |python )", re.MULTILINE)
    assert not [str(block) for block in blocks("") if command.search(block.text)]


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_the_shell_parses_it_and_files_that_it_names_are_there(block):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"(?<![\w/.-])(?:examples|tools|tests|benchmarks|docs)/[\w./-]+", block.text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("words", OURS)
def test_every_command_is_one_that_the_verbs_understand(words):
    if words[0] in ("--help", "--version", "VERB"):
        return
    assert words[0] in VERBS
    try:
        _parse(parser_of(words[0]), words)
    except SystemExit as end:  # argparse has said why
        assert end.code == 0, words


def test_every_named_config_is_planned(tmp_path, monkeypatch, capsys):
    """Also for more GPUs than there are, without data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    planned = 0
    for parameter in OURS:
        (words,) = parameter.values
        if words[0] == "pretrain" and (ROOT / words[1]).is_file():
            assert main([*words, *["--dry-run"] * ("--dry-run" not in words)]) == 0, words
            assert "parameters   " in capsys.readouterr().out
            planned += 1
    assert planned > 5


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_config_or_a_part_of_one_builds(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/decoder").mkdir(parents=True)
    (tmp_path / "runs/decoder/config.yaml").write_text(yaml.safe_dump({"model": PRESETS["tiny"]}))
    given = schema.parse_yaml(block.text, str(block))
    if given.keys() == {"negatives"}:  # of a set to fine-tune on
        schema.build(NegativesConfig, given["negatives"])
        return
    assert given.keys() <= {field.name for field in fields(Config)}
    total = {"total": {"tokens": 300e9}} if any("fraction" in phase for phase in given.get("phases", ())) else {}
    config = load_config({**BASE, "run": {**BASE["run"], **total}, **given})
    assert lay_out(config)[-1].end > 0
    if {"run", "tokenizer", "data", "model", "phases"} <= given.keys():  # a whole one
        (tmp_path / "config.yaml").write_text(block.text)
        assert main(["pretrain", "config.yaml", "--dry-run"]) == 0


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with an encoder where the pages have the demo's, a run, and the documentation."""
    here = workspace(tmp_path_factory.mktemp("docs"))
    run_cli("pretrain", here / "config.yaml", f"run.dir={here / 'run'}", "model.hidden_size=256")
    run_cli("export", here / "run", here / "work_dirs/demo/hf")
    shutil.copytree(ROOT / "docs", here / "docs")
    return here


EACH = """
import sys
for text in sys.argv[1:]:
    exec(compile(text, "<block>", "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("needs", ["", "sentence_transformers"])
def test_python_runs_as_written(needs, encoder):
    """All blocks in one process, which spares the imports; a shape that a comment tells is the one that is printed."""
    if needs and not is_available(needs):
        pytest.skip(f"{needs} is not installed here: ENCDEC_ENV=nemo bash tests/run.sh tests/test_docs.py")
    texts = [block.text for block in blocks("python") if bool(needs) == ("sentence_transformers" in block.text)]
    assert texts
    done = subprocess.run([sys.executable, "-c", EACH, *texts], cwd=encoder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    shapes = re.findall(r"# ((?:torch\.Size\(\[|\().*\d\]?\))$", "\n".join(texts), re.MULTILINE)
    assert shapes and all(shape in done.stdout for shape in shapes)


@pytest.mark.slow
def test_your_own_text_runs_as_written(encoder, tmp_path):
    """The README's commands and config, on ten text files; a small random Llama takes the place of the download."""
    save("llama2", tmp_path / "models/decoder", encoder / "tokenizer")
    documents = [json.loads(line)["text"] for line in (encoder / "corpus.jsonl").read_text().splitlines()]
    (tmp_path / "mytexts").mkdir()
    for number in range(10):
        (tmp_path / f"mytexts/{number}.txt").write_text("\n".join(documents[number::10]))
    (block,) = [one for one in blocks("bash") if "my_encoder.yaml" in one.text and one.page == "README.md"]
    (config,) = [one for one in blocks("yaml") if "runs/my_encoder" in one.text]
    (tmp_path / "my_encoder.yaml").write_text(config.text)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/megatron-encdec"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_encdec "$@"\n')
    command.chmod(0o755)
    download, *rest = block.text.splitlines()
    assert download.startswith("hf download ") and download.endswith(" --local-dir models/decoder") and len(rest) == 4
    done = subprocess.run(["bash", "-e", "-c", "\n".join(rest)], cwd=tmp_path, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "models/my_encoder: EuroBertForMaskedLM, bidirectional attention" in done.stdout
    assert json.loads((tmp_path / "models/my_encoder/sentence_bert_config.json").read_text())["max_seq_length"] == 128


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_the_readme_is_a_tour():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    links = [re.findall(r"\]\((?:docs/)?(\w[\w-]*\.md)", page.read_text(encoding="utf-8")) for page in PAGES]
    assert {page.name for page in PAGES if page.parent == ROOT / "docs"} <= set().union(*links)  # no page is an island


def test_every_verb_has_its_line():
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"| `{verb} " not in text and f"| `{verb}` " not in text] == []


def test_the_page_of_keys_is_up_to_date():
    """In a process of its own: typing keeps one object for a Literal in whatever order it was first written."""
    words = [sys.executable, ROOT / "tools/config_reference.py", "--check"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_site_builds_without_a_warning(tmp_path):
    zensical = shutil.which("zensical", path=f"{ROOT}/.venv-docs/bin:{Path(sys.executable).parent}")
    if zensical is None:
        pytest.skip("zensical is not installed here: pip install -e '.[docs]'; .ci/run puts it into .venv-docs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in (tmp_path / "site").glob("*.html")} >= {path.stem for path in PAGES[2:]}
