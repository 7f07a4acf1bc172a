"""Shards against their definition, hashes against hashlib."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_encdec.data.fingerprint import Range, hash_ranges, ranges_of


def shard_ranges(folder, parts, shard_bytes):
    """(start, end) of each shard of a `.bin`."""
    (folder / "d.idx").touch()
    return [(one.start, one.end) for one in ranges_of(folder / "d", parts, shard_bytes)[:-1]]


@pytest.mark.parametrize(("parts", "expected"), [
    ((), []), ((0,), []), ((10,), [(0, 4), (4, 8), (8, 10)]), ((8,), [(0, 4), (4, 8)]),
    ((6, 5), [(0, 4), (4, 6), (6, 10), (10, 11)]), ((3, 0, 4), [(0, 3), (3, 7)])])
def test_the_grid_starts_again_at_each_part(tmp_path, parts, expected):
    assert shard_ranges(tmp_path, parts, 4) == expected


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(1, 20))
def test_shards_tile_the_file_and_merging_keeps_them(tmp_path_factory, parts, shard_bytes):
    folder = tmp_path_factory.getbasetemp()
    merged, start = [], 0
    for part in parts:
        merged += [(start + a, start + b) for a, b in shard_ranges(folder, (part,), shard_bytes)]
        start += part
    assert shard_ranges(folder, parts, shard_bytes) == merged
    assert [a for a, _ in merged] == [0, *(b for _, b in merged)][: len(merged)]
    assert sum(b - a for a, b in merged) == start and all(0 < b - a <= shard_bytes for a, b in merged)


def test_hashes_are_hashlibs(tmp_path, monkeypatch):
    data = bytes(range(256)) * 40
    (tmp_path / "d.bin").write_bytes(data)
    (tmp_path / "d.idx").write_bytes(b"index")
    ranges = ranges_of(tmp_path / "d", (5000, 5240), 3000)
    assert [(one.path.name, one.start, one.end) for one in ranges] == [
        ("d.bin", 0, 3000), ("d.bin", 3000, 5000), ("d.bin", 5000, 8000), ("d.bin", 8000, 10240), ("d.idx", 0, 5)]
    expected = [hashlib.sha256(one.path.read_bytes()[one.start : one.end]).hexdigest() for one in ranges]
    for piece in (1 << 20, 7):
        monkeypatch.setattr("megatron_encdec.data.fingerprint.PIECE", piece)
        assert hash_ranges(ranges, "test") == expected


def test_what_cannot_be_read_is_told_beside_the_rest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    found = hash_ranges([Range(tmp_path / "gone", 0, 5), Range(tmp_path / "a", 1, 3)], "test")
    assert isinstance(found[0], FileNotFoundError) and found[1] == hashlib.sha256(b"bc").hexdigest()


def test_progress_has_a_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_encdec.platform.progress.SECONDS_BETWEEN_LINES", 0)
    (tmp_path / "a").write_bytes(b"abc")
    hash_ranges([Range(tmp_path / "a", 0, 3)], "verifying corpora/a")
    assert "verifying corpora/a: 100%" in (error := capsys.readouterr().err) and "MB/s" in error
