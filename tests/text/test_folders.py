"""Folders and patterns: every file below is listed, or counted in a line, or refused; links lead on, never round."""

import os
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.inputs import list_files, suffix_of


def paths_of(*inputs):
    return [file.path for file in list_files(inputs)]


@pytest.fixture
def tree(tmp_path):
    """`data` with files, and `elsewhere`, which it has links to."""
    for name in ("data/b/2.txt", "data/b/10.txt", "data/a.jsonl", "data/.hidden/x.txt", "data/b/.DS_Store",
                 "elsewhere/deep/z.JSONL"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path / "data"


def test_listing_is_sorted_deep_and_without_repeats(tree, capsys):
    names = paths_of(tree / "b/10.txt", tree, f"{tree}/**/*.txt")
    assert names == [str(tree / name) for name in ("b/10.txt", "a.jsonl", "b/2.txt")]
    assert capsys.readouterr().err == "note: not read: 2 hidden (a name that begins with a dot)\n"


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*", "/**/*.[jJ]*", "/*"])
def test_links_to_folders_are_followed_and_circles_are_not(tree, pattern):
    (tree / "more").symlink_to(tree.parent / "elsewhere")
    for name, target in (("b/up", ".."), ("again", "b"), ("self", "."), ("b/root", tree), ("b/up2", "../b")):
        (tree / name).symlink_to(target)
    names = [name for name in paths_of(f"{tree}{pattern}") if not name.endswith(".txt")]
    assert names == [str(tree / name) for name in ("a.jsonl", "more/deep/z.JSONL")]
    if "J" not in pattern:
        assert [name for name in paths_of(f"{tree}{pattern}") if name.endswith(".txt")] == [
            str(tree / name) for name in ("b/10.txt", "b/2.txt")]


def test_patterns_from_here(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert paths_of("**/*.txt") == ["b/10.txt", "b/2.txt"]
    assert paths_of("./**/2.txt", "*.jsonl") == ["./b/2.txt", "a.jsonl"]
    assert paths_of("**/b/**/*.txt", "b*") == ["b/10.txt", "b/2.txt"]
    (tree / "part.jsonl").mkdir()  # as Spark names a folder
    (tree / "part.jsonl" / "part-0.jsonl").write_text("x")
    assert paths_of("*.jsonl") == paths_of("**/*.jsonl") == ["a.jsonl", "part.jsonl/part-0.jsonl"]
    (tree / "[1] a?").mkdir()
    (tree / "[1] a?" / "x.txt").write_text("x")
    assert paths_of("[1] a?") == paths_of("**/x.txt") == ["[1] a?/x.txt"]


def test_what_is_not_read_is_counted_by_suffix(tree, capsys):
    for name in ("1.csv", "b/2.CSV", "3.json.bz2", "_SUCCESS", "b/v1.2"):
        (tree / name).write_text("x")
    (tree / "dataset_info.json").write_text('{\n "features": 1\n}\n')
    (tree / "rows.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(paths_of(tree)) == 4
    line = capsys.readouterr().err
    assert line.startswith("note: not read: 2 .csv, ")
    for part in ("1 .json.bz2", "1 without a suffix", "1 .json (one JSON object over many lines)", "2 hidden", "1 .2"):
        assert part in line
    assert "; convert it: python -c" in line
    assert len(line.splitlines()) == 1


def test_listing_refuses_by_name(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "more.json.xz").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").symlink_to("gone")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "mounted").symlink_to("/nowhere/at/all")
    (tmp_path / "round").mkdir()
    (tmp_path / "round" / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for item, message in ((tmp_path / "absent", "absent: no such file"),
                          (tmp_path / "data.csv", r"data\.csv: cannot read this kind of file; supported.*read_csv"),
                          (tmp_path / "more.json.xz", r"cannot read this kind of file.*decompress it first: xz -dk"),
                          (tmp_path / "empty", r"empty: no file to read \(input\)$"),
                          (f"{tmp_path}/*.txt", "no file matches"),
                          (f"{tmp_path}/*.csv", r"no file to read \(input\); there are 1 \.csv; supported"),
                          (tmp_path / "broken.jsonl", "a link to gone, which cannot be read"),
                          (tmp_path / "links", "links/mounted: a link to /nowhere/at/all, which cannot be read"),
                          (tmp_path / "round", "round/self: .*Too many levels of symbolic links"),
                          (tmp_path / "pipe.jsonl", "a pipe, socket or device, not a file"),
                          (tmp_path, r"self: |(broken|pipe)\.jsonl: a ")):
        with pytest.raises(UserError, match=message) as error:
            list_files([item])
        assert "\n" not in str(error.value)


def test_sockets_are_said(tree, capsys):
    place = Path(tempfile.mkdtemp())  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "s.sock"))
        (place / "a.txt").write_text("x")
        assert paths_of(place) == [str(place / "a.txt")]
    assert "1 .sock" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused(tree):
    (tree / "b").chmod(0)
    try:
        with pytest.raises(UserError, match="b: cannot look into this folder: Permission denied"):
            list_files([tree])
    finally:
        (tree / "b").chmod(0o755)
    (tree / "a.jsonl").chmod(0)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot read the input: Permission denied"):
        list_files([tree])


def test_a_file_with_two_names_is_read_once(tree, capsys):
    (tree / "b/hard.txt").hardlink_to(tree / "b/2.txt")
    (tree / "soft.jsonl").symlink_to("a.jsonl")
    assert paths_of(tree) == [str(tree / name) for name in ("a.jsonl", "b/10.txt", "b/2.txt")]
    assert "note: read once: 2 files that are links to others of the input (first: " in capsys.readouterr().err


@pytest.mark.parametrize(("name", "suffix"), [
    ("a.csv", ".csv"), ("a.JSON.gz", ".json.gz"), ("v1.2.gz", ".gz"), ("README", ""), ("x.tar.zst", ".tar.zst"),
    ("a.jsonl~", ".jsonl~"), ("a b.c d", ""), (".hidden", "")])
def test_suffixes(name, suffix):
    assert suffix_of(f"some.folder/{name}") == suffix


NAMES = st.sampled_from(["a.txt", "b.jsonl", "c.json", "d.csv", "e", ".f.txt", "g.json.gz.part", "H.TXT"])
FOLDERS = st.lists(st.sampled_from(["x", "y", ".z"]), max_size=3).map("/".join)
ENTRIES = st.one_of(st.tuples(st.just("file"), FOLDERS, NAMES),
                    st.tuples(st.just("link"), FOLDERS, st.sampled_from(["l1", "l2"]), FOLDERS),
                    st.tuples(st.just("hard"), FOLDERS, NAMES, FOLDERS, NAMES))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ENTRIES, min_size=1, max_size=12))
def test_every_file_of_a_tree_is_listed_or_counted(capsys, entries):
    """Against a walk of our own over real folders: files that can be reached by a name without a dot."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "root")
        root.mkdir()
        (root / "always.txt").write_text("x")
        for kind, folder, entry, *target in entries:
            path = root / folder / entry
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() or path.is_symlink():
                continue
            if kind == "file":
                path.write_text("x")
            elif kind == "link":
                (root / target[0]).mkdir(parents=True, exist_ok=True)
                path.symlink_to(root / target[0])
            elif (root / "/".join(target)).is_file():
                path.hardlink_to(root / "/".join(target))
        reached, hidden = walk(root)
        capsys.readouterr()
        found = list_files([root])
        note = next((line for line in capsys.readouterr().err.splitlines() if "not read" in line), "")
    readable = {inode for inode, names in reached.items() if any(is_read(name) for name in names)}
    counted = sum(not is_read(name) for names in reached.values() for name in names)
    assert len(found) == len({file.path for file in found}) == len(readable)
    parts = note.removeprefix("note: not read: ").split("; ")[0].split(", ") if note else []
    numbers = [int(part.split()[0]) for part in parts]
    assert sum(numbers) == counted + hidden


def is_read(name):
    return name.lower().endswith((".txt", ".jsonl", ".json"))


def walk(root):
    """({inode: names of it in the folders reached}, hidden names), each folder once, links to folders followed."""
    waiting, done, reached, hidden = [root], set(), {}, 0
    while waiting:
        folder = waiting.pop().resolve()
        if folder in done:
            continue
        done.add(folder)
        for path in folder.iterdir():
            if path.name.startswith("."):
                hidden += 1
            elif path.is_dir():
                waiting.append(path)
            else:
                reached.setdefault(path.stat().st_ino, []).append(path.name)
    return reached, hidden
