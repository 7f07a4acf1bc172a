"""Documents that are never held as a whole: at the real limits, and their memory. (Small ones: test_fuzz.py.)"""

import gzip
import json
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from megatron_encdec.text import documents
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.chunks import slots
from megatron_encdec.text.documents import LONG, Batch, LongDocument, read_chunk
from megatron_encdec.text.inputs import list_files
from megatron_encdec.text.preprocess import preprocess
from megatron_encdec.text.tokenizer import load_tokenizer

UNIT = "the encoder reads naïve — 東京 \"quoted\" \\ words 😀\tand 'more'.\n"


def parts_of(path):
    return [part for chunk in slots(list_files([path]), "text") for part in read_chunk(chunk, "text")]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_long_line_is_decoded_in_pieces(tmp_path, ascii_only):
    text = UNIT * (2 * LONG // len(UNIT.encode()) + 1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"more": "x" * (2 << 20), "text": text}, ensure_ascii=ascii_only)
                    + '\n{"text": "b"}')
    parts = parts_of(path)
    assert [part for part in parts if isinstance(part, LongDocument)] == [parts[1]]
    assert parts[1].place[1:] == (2, path.stat().st_size - len('{"text": "a"}\n{"text": "b"}'))
    pieces = list(parts[1].pieces())
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= documents.PIECE + 10
    assert [part.texts_D for part in parts if isinstance(part, Batch) and part.texts_D] == [[b"a"], [b"b"]]


@pytest.mark.parametrize(("body", "reason"), [
    ('"text": "%s\\x"', "bad_json"), ('"text": "%s\n"', "bad_json"), ('"text": "%s\\ud800"', "bad_utf8"),
    ('"text": "%s\udcff"', "bad_utf8"), ('"text": "%s', "bad_json"), ('"other": "%s"', "missing_key"),
    ('"text": "%s", "text": 1', "not_text"), ('"text": 1, "other": "%s\\x"', "bad_json"),
    ('"text": "", "other": "%s\0"', "bad_json"), ('"text": "%s", "text": " "', "empty"),
    ('"%s": "a", "text": "\\ud800"', "bad_utf8")])
def test_reasons_of_long_lines(tmp_path, body, reason):
    path = tmp_path / "a.jsonl"
    content = ("{" + body.replace("\n", "\x01") % ("word " * (2 * LONG // 5)) + "}").encode("utf-8", "surrogateescape")
    path.write_bytes(content + b"\n")
    assert [part.skipped for part in parts_of(path) if part.skipped] == [[(reason, (0, 1, len(content) + 1))]]


def test_text_without_a_blank_is_decoded_in_pieces_too(tmp_path):
    for unit in ("x", "東", "a\\n", "\\u6771", "\\ud83d\\ude00"):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "%s"}' % (unit * (2 * LONG // len(unit.encode()) + 1)))
        (part,) = [part for part in parts_of(path) if isinstance(part, LongDocument)]
        assert max(len(piece) for piece in part.pieces()) <= documents.PIECE + 10
        assert sum(map(len, part.pieces())) == len(json.loads(path.read_bytes())["text"])


def test_a_line_across_many_chunks_is_read_a_few_times_only(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_encdec.text.chunks.CHUNK_BYTES", 1 << 18)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "%s"}' % ("x" * (20 << 20)))
    read = [0]

    class Counting:
        def __init__(self, file):
            self.file = file

        def read(self, count):
            read[0] += count
            return self.file.read(count)

        def seek(self, place):
            self.file.seek(place)

    with open(path, "rb") as file:
        for chunk in slots(list_files([path]), "text"):
            if chunk.start:
                assert documents._next_line(Counting(file), chunk.start - 1, chunk.end) >= chunk.end
    assert read[0] <= 4 * path.stat().st_size


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_long_document_has_the_ids_of_the_whole(tokenizer_dir, tmp_path, suffix):
    text = (UNIT * (2 * LONG // len(UNIT.encode()) + 1)).replace("\t", " ")
    (tmp_path / f"a{suffix}").write_text(text if suffix == ".txt" else json.dumps({"text": text}) + "\n")
    manifest = preprocess([tmp_path / f"a{suffix}"], tokenizer_dir, tmp_path / "out", workers=1, progress=False)
    assert (manifest.documents, manifest.characters, manifest.unproven_cuts) == (1, len(text), 0)
    ids = np.fromfile(tmp_path / "out.bin", np.uint16)
    tokenizer = load_tokenizer(tokenizer_dir)
    whole = tokenizer.encode(UNIT.replace("\t", " ") * 1000)  # lines are words' ends: the ids repeat
    assert ids[-1] == 0
    per_unit, rest = divmod(len(whole), 1000)
    assert rest == 0
    assert np.array_equal(ids[:-1], np.resize(np.array(whole[:per_unit], np.uint16), len(ids) - 1))


# --------------------------------------------------------------------------------------------------------- memory
def peak_of(command):
    """(bytes: the most that the processes of a command held together, its result)."""
    process = psutil.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]))
        except psutil.NoSuchProcess:
            pass  # ended in between
        time.sleep(0.01)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return peak, output


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["gigatoken", "tokenizers"])
@pytest.mark.parametrize("kind", ["ascii", "emoji", "no blanks", "cjk"])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".jsonl.gz", ".parquet"])
def test_memory_of_a_document_of_200_megabytes(tokenizer_dir, tmp_path, suffix, kind, encoder):
    size = 200_000_000 if encoder == "gigatoken" else 40_000_000
    words = np.random.default_rng(1).integers(0, 5000, 400_000)
    text = ("" if kind == "no blanks" else " ").join(f"word{number}" for number in words.tolist())
    if kind == "emoji":  # every few kB: such a string takes four bytes a character
        text = " 😀 ".join(text[start : start + 4000] for start in range(0, len(text), 4000))
    elif kind == "cjk":
        text = "".join(chr(0x4E00 + number) for number in words.tolist())
    text *= size // len(text.encode()) + 1
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        path.write_text(text)
    elif suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", text, "b"]}), path)
    else:
        line = json.dumps({"text": text}, ensure_ascii=kind == "emoji") + '\n{"text": "b"}\n'
        path.write_bytes(gzip.compress(line.encode(), 1) if suffix == ".jsonl.gz" else line.encode())
        del line
    del text
    peak, output = peak_of([sys.executable, "-m", "megatron_encdec", "preprocess", "--input", path, "--workers", "2",
                            "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", "--encoder", encoder])
    assert manifests.read(tmp_path / "out").bytes_in >= size
    assert ("cut for the tokenizer" in output) == (kind in ("no blanks", "cjk"))
    print(f"{suffix} {kind} {encoder}: {peak / 1e6:.0f} MB")
    assert peak < 1.5e9
