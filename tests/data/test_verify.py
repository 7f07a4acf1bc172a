"""A flipped bit anywhere is found, and where it is."""

import json
import os

import numpy as np
import pytest

from megatron_encdec.data.fingerprint import record_path, verify
from megatron_encdec.data.store import TokenStore
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.text.manifest import manifest_path


@pytest.fixture
def small(tmp_path, write_pair):
    """A pair of 20 tokens in 4 documents."""
    return write_pair(tmp_path / "small", [list(range(5 * k, 5 * k + 5)) for k in range(4)])


def flip(path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_equal_data_passes(small, write_manifest):
    manifest = write_manifest(small, shard_bytes=16)
    found = verify(small)
    assert (found["record"], found["new"]) == (str(manifest_path(small)), False)
    assert (found["shards"], found["fingerprint"]) == (3, manifest.fingerprint)
    assert found["bytes"] == 40 + small.with_name("small.idx").stat().st_size


@pytest.mark.parametrize("recorded", ["manifest", "record"])
def test_every_flipped_bit_is_found(small, write_manifest, recorded):
    if recorded == "manifest":
        write_manifest(small, shard_bytes=16)
    else:
        assert verify(small)["new"]
    for suffix in ("bin", "idx"):
        path = small.with_name(f"small.{suffix}")
        size, draw = path.stat().st_size, np.random.default_rng(0)
        for at in range(size):
            bit = int(draw.integers(8))
            flip(path, at, bit)
            with pytest.raises(IntegrityError, match=f"small.{suffix}"):
                verify(small)
            flip(path, at, bit)
    assert not verify(small)["new"]


def test_the_shard_is_named(small, write_manifest):
    write_manifest(small, shard_bytes=16)
    for at, shard in ((0, "bytes 0..16 (shard 1 of 3)"), (31, "bytes 16..32 (shard 2 of 3)"),
                      (39, "bytes 32..40 (shard 3 of 3)")):
        flip(small.with_name("small.bin"), at)
        with pytest.raises(IntegrityError) as caught:
            verify(small)
        message = str(caught.value)
        assert f"small.bin {shard}: not the bytes that {manifest_path(small)} recorded" in message
        assert message.count("shard ") == 1 and "\n" not in message
        flip(small.with_name("small.bin"), at)
    flip(small.with_name("small.idx"), 40)  # a length, which nothing at the start of training looks at
    with pytest.raises(IntegrityError, match=r"small.idx bytes 0\.\.\d+ \(the whole file\)"):
        verify(small)


def test_much_damage_stays_one_line(small, write_manifest):
    write_manifest(small, shard_bytes=8)
    small.with_name("small.bin").write_bytes(b"\xff" * 40)
    with pytest.raises(IntegrityError, match=r"shard 1 of 5.*shard 3 of 5\), and 2 more: not the bytes"):
        verify(small)


def test_merged_parts_have_grids_of_their_own(small, write_manifest):
    write_manifest(small, shard_bytes=16, parts=(20, 20))
    assert verify(small)["shards"] == 4
    flip(small.with_name("small.bin"), 21)
    with pytest.raises(IntegrityError, match=r"small.bin bytes 20\.\.36 \(shard 3 of 4\)"):
        verify(small)


def test_without_a_manifest_the_first_look_records_and_the_next_compares(small):
    first = verify(small)
    assert first["new"] and first["record"] == str(record_path(small))
    assert first["fingerprint"] == TokenStore(small).fingerprint == verify(small)["fingerprint"]
    flip(small.with_name("small.bin"), 7)
    os.utime(small.with_name("small.bin"), ns=(1, 1))  # a new time is no excuse
    with pytest.raises(IntegrityError, match=f"small.bin bytes 0..40 .* {record_path(small)} recorded"):
        verify(small)


def test_a_size_that_the_record_does_not_know(small, write_pair):
    verify(small)
    write_pair(small, [[1, 2, 3]])  # another corpus under the same name
    with pytest.raises(IntegrityError, match=f"small.bin: truncated: .*{record_path(small)} says: delete that"):
        verify(small)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_truncated_and_appended_files_are_told_by_their_sizes(small, write_manifest, suffix):
    write_manifest(small)
    path = small.with_name(f"small.{suffix}")
    whole = path.read_bytes()
    for data, word in ((whole[:-2], "truncated"), (whole + b"xx", "has bytes appended")):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=f"small.{suffix}: {word}: expected {len(whole):,} bytes"):
            verify(small)


def test_a_manifest_with_shards_missing_is_told(small, write_manifest):
    write_manifest(small, shard_bytes=16)
    content = json.loads(manifest_path(small).read_text())
    content["shard_bytes"] = 8
    manifest_path(small).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="small.manifest.json: lists 3 shards, .*small.bin has 5 of 8 bytes"):
        verify(small)


def test_an_unreadable_directory_is_said(small):
    record_path(small).mkdir()
    assert verify(small)["record"].startswith("nowhere")
