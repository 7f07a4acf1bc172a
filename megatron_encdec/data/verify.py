"""Is every byte still what was written? All shards are hashed again and compared with what was recorded.

    1. `expected_hashes(prefix)`   from the manifest, else from the record kept beside data without one
    2. `verify(prefix)`            hash on all cores, name every range of bytes that differs

Sizes come first. Headers and counts need no look: they are what was written if the bytes are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.data.fingerprint import compute_record, keep_record, read_record, record_path
from megatron_encdec.data.shards import Range, hash_ranges, ranges_of, shard_ranges
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.text.indexed import bin_path, idx_path, size_error
from megatron_encdec.text.manifest import check_files, manifest_path, read

NAMED = 3  # damaged ranges that an error spells out


@dataclass(frozen=True)
class Expected:
    """What the bytes must hash to: a hash a range, as `record` (a file) says."""

    record: Path
    ranges: list[Range]
    hashes: list[str]


@dataclass(frozen=True)
class Verification:
    """What was read and found equal. `new`: nothing was recorded before, the hashes have only now been kept."""

    record: str
    new: bool
    shards: int
    bytes: int
    fingerprint: str


def expected_hashes(prefix: str | Path) -> tuple[Expected, str] | None:
    """The recorded hashes and the fingerprint they make; None where nothing is recorded."""
    if manifest_path(prefix).exists():
        manifest = read(prefix)
        _check_sizes(prefix, manifest.bin_bytes, manifest.idx_bytes)
        parts = getattr(manifest, "parts", None) or (manifest.bin_bytes,)
        return _expected(prefix, manifest_path(prefix), manifest, parts), manifest.fingerprint
    record = read_record(prefix)
    if record is None:
        return None
    sizes = [record.files[suffix].bytes for suffix in ("bin", "idx")]
    _check_sizes(prefix, *sizes, hint=f" (as {record_path(prefix)} says: delete that if the data was replaced)")
    return _expected(prefix, record_path(prefix), record, sizes[:1]), record.fingerprint


def _check_sizes(prefix: str | Path, *sizes: int, hint: str = "") -> None:
    for path, size in zip((bin_path(prefix), idx_path(prefix)), sizes, strict=True):
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; copy it again, or run preprocess again")
        if path.stat().st_size != size:
            raise IntegrityError(f"{size_error(path, size, path.stat().st_size)}{hint}")


def _expected(prefix: str | Path, path: Path, record, parts: Sequence[int]) -> Expected:
    ranges = ranges_of(prefix, shard_ranges(parts, record.shard_bytes))
    hashes = [*record.shards, record.idx_sha256]
    if len(ranges) != len(hashes) or sum(parts) != bin_path(prefix).stat().st_size:
        raise IntegrityError(f"{path}: lists {len(record.shards)} shards, {bin_path(prefix)} has {len(ranges) - 1} "
                             f"of {record.shard_bytes} bytes: it is damaged; copy it again, or run preprocess again")
    return Expected(path, ranges, hashes)


def verify(prefix: str | Path) -> Verification:
    """Hash everything again. Raises IntegrityError naming file and byte range of what differs or cannot be read.

    Where nothing is recorded yet the hashes are kept for the next time, and `new` says so.
    """
    found = expected_hashes(prefix)
    if found is None:
        check_files(prefix)
        record = compute_record(prefix)
        kept = record_path(prefix) if keep_record(prefix, record) else None
        size = sum(state.bytes for state in record.files.values())
        return Verification(str(kept or "nowhere: the directory cannot be written"), True, len(record.shards), size,
                            record.fingerprint)
    expected, fingerprint = found
    hashes = hash_ranges(expected.ranges, f"verifying {prefix}")
    damaged = [_damage(one, len(expected.ranges) - 1, k, found_hash)
               for k, (one, wanted, found_hash) in enumerate(zip(expected.ranges, expected.hashes, hashes, strict=True))
               if found_hash != wanted]
    if damaged:
        more = f", and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise IntegrityError(f"{', '.join(damaged[:NAMED])}{more}: not the bytes that {expected.record} recorded; copy "
                             "the data again, or run preprocess again")
    return Verification(str(expected.record), False, len(expected.ranges) - 1,
                        sum(one.bytes for one in expected.ranges), fingerprint)


def _damage(one: Range, shards: int, number: int, found: str | OSError) -> str:
    unread = f" (cannot be read: {found.strerror})" if isinstance(found, OSError) else ""
    which = "the whole file" if number == shards else f"shard {number + 1} of {shards}"
    return f"{one.path} bytes {one.start:,}..{one.end:,} ({which}){unread}"
