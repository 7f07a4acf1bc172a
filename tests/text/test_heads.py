"""Files that are not what their name says: refused before any work, with the cause, and a command that mends them."""

import gzip
import json
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
from corpora import texts_of

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.corpus import kind_of
from megatron_encdec.text.inputs import list_files

ROWS = [{"text": f"naïve {i}", "id": i} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
GZIPPED = gzip.compress(LINES.encode(), mtime=0)  # the same in each process that collects these tests
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
CONTENTS = {
    "array on a line": (json.dumps(ROWS), "a JSON array, not JSON lines"),
    "array of rows on lines": ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", "a JSON array, not JSON lines"),
    "indented array": (json.dumps(ROWS, indent=1), "a JSON array, not JSON lines"),
    "long array": (json.dumps(ROWS * 5000), "a JSON array, not JSON lines"),
    "object": (json.dumps(ROWS[0], indent=2), "one JSON object over many lines"),
    "utf-16": (LINES.encode("utf-16"), "is in UTF-16 or UTF-32, not in UTF-8"),
    "cr": (LINES.replace("\n", "\r"), "its lines end with CR alone"),
}


def encoded(content, suffix):
    data = content.encode() if isinstance(content, str) else content
    return {".gz": gzip.compress, ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}.get(
        suffix[suffix.rindex("."):], bytes)(data)


def refusal(path):
    with pytest.raises(UserError, match=path.name.replace(".", r"\.")) as error:
        list_files([path])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_the_command_in_the_message_mends_the_file(tmp_path, kind, suffix):
    content, cause = CONTENTS[kind]
    path = tmp_path / f"a b{suffix}"
    path.write_bytes(encoded(content, suffix))
    message = refusal(path)
    assert cause in message
    command = message[message.index(": ", message.index(cause)) + 2 :].removesuffix(" (or -f UTF-32)")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)
    (new,) = tmp_path.glob("NEW*")
    rows = ROWS[:1] if kind == "object" else ROWS * 5000 if kind == "long array" else ROWS
    assert list_files([new])
    assert texts_of(new) == [row["text"] for row in rows]


@pytest.mark.parametrize("content", [
    LINES, LINES.replace("\n", "\r\n"), "\ufeff" + LINES, "\n\n" + LINES, "[1, 2]\n" + LINES, '["a"]\n' + LINES,
    '[{"text": "a"}]\n' + LINES, '{"text": "cut\n' + LINES, "{\n" + LINES, '{"text": "a\\u0000"}\n', "[", "[]", "{}",
    "", "nothing of the kind", '{"text": "' + "word " * 50_000 + '"}\n' + LINES], ids=range(16))
def test_lines_with_a_mistake_are_for_the_readers_to_count(tmp_path, content):
    for suffix in (".jsonl", ".json", ".ndjson.gz", ".json.zst"):
        path = tmp_path / f"a{suffix}"
        if content or not suffix.endswith(".zst"):  # pyarrow makes no frame of nothing
            path.write_bytes(encoded(content, suffix))
            assert [file.path for file in list_files([path])] == [str(path)]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".md", ".json", ".jsonl.gz", ".ndjson.zst", ".parquet"])
def test_pointers_of_git_lfs(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(POINTER)
    assert "a Git LFS pointer" in refusal(path)
    assert "git lfs pull" in refusal(path)


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.jsonl", GZIPPED, "holds gzip data, which its name does not say"),
    ("a.jsonl.gz", LINES.encode(), "is no gzip file (it begins with b'"), ("a.jsonl.zst", b"x", "is no zstd file"),
    ("a.jsonl.zst", GZIPPED, "holds gzip data"),
    ("a.jsonl.gz", gzip.compress(GZIPPED, mtime=0), "holds gzip data when decompressed"),
    ("a.parquet", LINES.encode(), "is no Parquet file"), ("a.parquet", b"\n<!DOCTYPE HTML><html>", "is an HTML page"),
    ("a.jsonl", b"<html><body>404", "is an HTML page"), ("a.jsonl", b"PK\x03\x04" + bytes(30), "holds zip data"),
    ("a.jsonl.gz", b"", "0 bytes, which is no gzip file"), ("a.json.zst", b"", "0 bytes, which is no zstd file"),
    ("a.parquet", b"", "0 bytes, which is no Parquet file"), ("a.jsonl", bytes(100_000), "nothing but zero bytes"),
    ("a.json.gz", GZIPPED[:-20] + bytes(12), "a.json.gz: damaged|cut off")])
def test_other_formats_under_this_name(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    assert any(part in refusal(path) for part in message.split("|"))


def test_a_name_that_says_it_is_enough(tmp_path):
    """What the message about a wrong name advises."""
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "a.jsonl.gz").symlink_to("a.jsonl")
    assert [kind_of(file.path) for file in list_files([tmp_path / "a.jsonl.gz"])] == ["stream"]
