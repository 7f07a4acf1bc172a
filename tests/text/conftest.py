"""A tokenizer trained once for all tests of this room, and a corpus with every kind of bad document."""

import json

import pytest

from megatron_encdec.text.tokenizer import train_tokenizer

WORDS = ["the encoder reads every word", "a mask hides one word in three", "naïve café — 東京", "x = f(y)\n"]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A byte-level BPE of 300 entries, as a directory."""
    directory = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(iter(WORDS * 20), 300, directory)
    return directory


@pytest.fixture
def mixed_corpus(tmp_path):
    """(directory, number of good documents, {reason: count}): good and bad documents in all four formats."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    good = [json.dumps({"text": f"{WORDS[i % 4]} {i}"}).encode() for i in range(300)]
    bad = [b"", b'{"text": "  "}', b'{"text": "cut', b"[1, 2]", b'{"body": "x"}', b'{"text": null}',
           b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100_000]
    (directory / "a.jsonl").write_bytes(b"\n".join([*good[:150], *bad, *good[150:]]))
    (directory / "b.txt").write_bytes(b"\xef\xbb\xbffirst line\r\nsecond line\x00\n")
    (directory / "c.md").write_bytes(b"")
    (directory / "d.txt").write_bytes(b"\xfe\xff")
    (directory / "e.jsonl").write_bytes(b"")
    return directory, 301, {"empty": 3, "bad_json": 3, "missing_key": 1, "not_text": 1, "bad_utf8": 2, "utf16": 1}
