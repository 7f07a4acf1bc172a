"""Is every byte still what was written? All shards are hashed again and compared with what their manifest says.

Sizes come first. Headers and counts need no look: they are what was written if the bytes are.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.data import fingerprint
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.text.indexed import bin_path, idx_path, size_error
from megatron_encdec.text.manifest import Manifest, check_files, manifest_path, read

NAMED = 3  # damaged ranges that an error spells out


@dataclass(frozen=True)
class Verification:
    """What was read and found equal. `new`: nothing was recorded before, the hashes have only now been kept."""

    record: str
    new: bool
    shards: int
    bytes: int
    fingerprint: str


def verify(prefix: str | Path) -> Verification:
    """Hash everything again. Raises IntegrityError naming file and byte range of what differs or cannot be read.

    Data without a manifest is compared with the one that was made for it at first sight; where nothing is recorded yet,
    the hashes are kept for the next time, and `new` says so.
    """
    own = manifest_path(prefix).exists()
    path = manifest_path(prefix) if own else fingerprint.record_path(prefix)
    manifest = read(prefix) if own else fingerprint.read_record(prefix)
    new = manifest is None
    if new:
        check_files(prefix)
        manifest = fingerprint.compute_record(prefix)
        if not fingerprint.keep_record(prefix, manifest):
            path = "nowhere: the directory cannot be written"
    else:
        _compare(prefix, manifest, path, "" if own else f" (as {path} says: delete that if the data was replaced)")
    return Verification(str(path), new, len(manifest.shards), manifest.bin_bytes + manifest.idx_bytes,
                        manifest.fingerprint)


def _compare(prefix: str | Path, manifest: Manifest, recorded_in: Path, hint: str) -> None:
    for path, size in ((bin_path(prefix), manifest.bin_bytes), (idx_path(prefix), manifest.idx_bytes)):
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; copy it again, or run preprocess again")
        if path.stat().st_size != size:
            raise IntegrityError(f"{size_error(path, size, path.stat().st_size)}{hint}")
    parts = manifest.parts or (manifest.bin_bytes,)
    ranges = fingerprint.ranges_of(prefix, parts, manifest.shard_bytes)
    expected = [*manifest.shards, manifest.idx_sha256]
    if len(ranges) != len(expected) or sum(parts) != manifest.bin_bytes:
        raise IntegrityError(f"{recorded_in}: lists {len(manifest.shards)} shards, {bin_path(prefix)} has "
                             f"{len(ranges) - 1} of {manifest.shard_bytes} bytes: it is damaged; copy it again, or run "
                             "preprocess again")
    hashes = fingerprint.hash_ranges(ranges, f"verifying {prefix}")
    damaged = [_damage(one, len(manifest.shards), k, found)
               for k, (one, wanted, found) in enumerate(zip(ranges, expected, hashes, strict=True)) if found != wanted]
    if damaged:
        more = f", and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise IntegrityError(f"{', '.join(damaged[:NAMED])}{more}: not the bytes that {recorded_in} recorded; copy "
                             "the data again, or run preprocess again")


def _damage(one: fingerprint.Range, shards: int, number: int, found: str | OSError) -> str:
    unread = f" (cannot be read: {found.strerror})" if isinstance(found, OSError) else ""
    which = "the whole file" if number == shards else f"shard {number + 1} of {shards}"
    return f"{one.path} bytes {one.start:,}..{one.end:,} ({which}){unread}"
