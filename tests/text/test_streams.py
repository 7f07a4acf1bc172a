"""Compressed files that are sound in every way tools write them, and the true cause where one is not."""

import gzip
import shutil
import struct
import subprocess

import pyarrow
import pytest
from corpora import texts_of

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text.streams import PIECE, open_stream

CONTENT = b"".join(b'{"text": "%d"}\n' % (i * 7919 % 100_003) for i in range(20_000))
SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"hello"
BOTH = pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="needs the zstd program")


def pack(data, suffix):
    return gzip.compress(data) if suffix.endswith(".gz") else pyarrow.compress(data, "zstd", asbytes=True)


def long_frame(data):
    """A frame that asks for a window of 2 GiB, as `zstd --long=31` writes for large input of unknown size."""
    return subprocess.run(["zstd", "-q", "--long=31", "-c"], input=data, capture_output=True, check=True).stdout


def contents(path):
    with open_stream(str(path)) as stream:
        return b"".join(iter(lambda: stream.read(PIECE), b""))


@BOTH
@pytest.mark.parametrize(("damage", "message"), [
    ("cut", r"cut off after line \d+: the file ends too early \(.*\); copy it again"),
    ("flipped", r"damaged after line \d+ \(.*\); copy it again"),
    ("appended", r"after line \d+ something follows that (gzip|zstd) did not write \(.*\); copy it again, or leave "
     r"that out: \w+ -dc .*/a\.\S+ \| \w+ > NEW\.jsonl\.\w+$")])
def test_a_damaged_stream_is_named_with_its_place(tmp_path, suffix, damage, message):
    packed = pack(CONTENT, suffix)
    middle = len(packed) // 2
    packed = {"cut": packed[:middle], "flipped": packed[:middle] + bytes(50) + packed[middle + 50 :],
              "appended": packed + b"some garbage"}[damage]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed)
    with open_stream(str(path)) as stream, pytest.raises(IntegrityError, match=rf"a\.jsonl\.\w+: {message}") as error:
        while stream.read(1000):
            pass
    assert "\n" not in str(error.value)


@BOTH
def test_members_one_after_the_other_are_one_stream(tmp_path, suffix):
    path, parts = tmp_path / f"a{suffix}", (b'{"text": "a"}\n{"te', b'xt": "b"}\n', b"", b'{"text": "c"}')
    between = SKIPPABLE if suffix.endswith(".zst") else b""
    path.write_bytes(between + between.join(pack(part, suffix) for part in parts if part) + between)
    assert texts_of(path) == ["a", "b", "c"]
    path.write_bytes(pack(CONTENT, suffix) + (b"" if between else bytes(600)))  # gzip on tapes is padded with zeros
    assert contents(path) == CONTENT


@needs_zstd
def test_frames_with_a_long_window(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(long_frame(CONTENT))
    assert contents(path) == CONTENT
    path.write_bytes(pack(CONTENT, ".zst") + SKIPPABLE + long_frame(CONTENT) + pack(b"end", ".zst"))
    assert contents(path) == CONTENT + CONTENT + b"end"
    with open_stream(str(path)) as stream:
        while stream.read(100_000):
            pass
        assert stream.consumed == path.stat().st_size
    with open_stream(str(path)) as stream:  # left early: the program ends
        assert len(stream.read(10)) == 10
    path.write_bytes(long_frame(CONTENT)[:-50])
    with pytest.raises(IntegrityError, match=r"a\.jsonl\.zst: cut off after line \d+"):
        contents(path)
    path.write_bytes(long_frame(CONTENT))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: was compressed with a window of more.*install it") as error:
        contents(path)
    assert not isinstance(error.value, IntegrityError)
    assert "copy it again" not in str(error.value)


@needs_zstd
def test_a_dictionary_that_is_not_there(tmp_path):
    (tmp_path / "words").write_bytes(CONTENT[:5000])
    (tmp_path / "a.jsonl").write_bytes(CONTENT)
    subprocess.run(["zstd", "-q", "-D", tmp_path / "words", tmp_path / "a.jsonl"], check=True)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: (was compressed with a dictionary|damaged)"):
        contents(tmp_path / "a.jsonl.zst")
