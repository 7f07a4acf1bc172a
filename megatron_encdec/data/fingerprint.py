"""The hashes that a manifest has of its data, and the manifest of data that came without one.

    1. `ranges_of(prefix, parts, shard_bytes)`   what is hashed: the shards of a .bin, and the whole .idx
    2. `hash_ranges(ranges)`                     sha256 of each, in threads: hashing does without the interpreter's lock
    3. `manifest_of_foreign(prefix)`             of data without one: kept as PREFIX.fingerprint.json while the files'
                                                 sizes and times stand, else computed and kept

Such a manifest says what the files themselves tell (sizes, counts, hashes); `tokenizer` and `settings`, which are not
known, are None. Its `inputs` are the two files as they were when hashed.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from megatron_encdec.platform.children import available_cores
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.platform.progress import Progress
from megatron_encdec.rundir.lock import taking_turns
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.indexed import SHARD_SIZE, IndexedFiles, bin_path, idx_path, read_header
from megatron_encdec.text.manifest import InputFile, Manifest, check_files, manifest_path

PIECE = 1 << 20  # bytes read at once by each thread
NAMED = 3  # damaged ranges that an error spells out


class Range(NamedTuple):
    """Bytes start .. end - 1 of a file."""

    path: Path
    start: int
    end: int


def ranges_of(prefix: str | Path, parts: Sequence[int], shard_bytes: int) -> list[Range]:
    """What a fingerprint covers: each shard of a `.bin` that was merged from `parts` (bytes each), then the `.idx`. A
    shard never crosses from one part into the next: merging keeps the hashes of what is merged."""
    ranges, part_start = [], 0
    for part in parts:
        part_end = part_start + part
        ranges += [Range(bin_path(prefix), start, min(start + shard_bytes, part_end))
                   for start in range(part_start, part_end, shard_bytes)]
        part_start = part_end
    return [*ranges, Range(idx_path(prefix), 0, idx_path(prefix).stat().st_size)]


def hash_ranges(ranges: Sequence[Range], label: str) -> list[str | OSError]:
    """Hex sha256 of each range, or the error that reading it gave; on all cores (hashing does without the interpreter's
    lock), with a progress line."""
    found: list[str | OSError] = [""] * len(ranges)
    sizes, done = [one.end - one.start for one in ranges], 0
    # The longest first (an index is one range however large), so that no core ends long after the others.
    order = sorted(range(len(ranges)), key=lambda k: (-sizes[k], k))
    with Progress(label, sum(sizes)) as progress, ThreadPoolExecutor(available_cores()) as pool:
        waiting = {pool.submit(_hash_range, ranges[k]): k for k in order}
        try:
            for future in as_completed(waiting):
                k = waiting[future]
                found[k] = future.result()
                done += sizes[k]
                progress.update(done, f"{done / progress.elapsed() / 1e6:,.0f} MB/s")
        except BaseException:  # Ctrl-C: do not go through the rest first
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _hash_range(one: Range) -> str | OSError:
    digest, buffer, at = hashlib.sha256(), memoryview(bytearray(min(PIECE, one.end - one.start))), one.start
    try:
        with open(one.path, "rb", buffering=0) as file:
            file.seek(one.start)
            while at < one.end and (count := file.readinto(buffer[: one.end - at])):
                digest.update(buffer[:count])
                at += count
    except OSError as error:
        return error
    return digest.hexdigest()


def record_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.fingerprint.json")


def read_record(prefix: str | Path) -> Manifest | None:
    """The kept manifest, whatever the data is now; None where it is absent or damaged: it is only a cache."""
    try:
        return manifests.read_file(record_path(prefix))
    except UserError:
        return None


def compute_record(prefix: str | Path) -> Manifest:
    """Hash the pair. Raises IntegrityError where it cannot be read or changes while it is read."""
    header, states = read_header(prefix), _states(prefix)
    ranges = ranges_of(prefix, [states[0].size], SHARD_SIZE)
    *shards, index = hashes = hash_ranges(ranges, f"hashing {prefix}")
    for one, found in zip(ranges, hashes, strict=True):
        if isinstance(found, OSError):
            raise IntegrityError(f"{one.path}: cannot read bytes {one.start:,}..{one.end:,}: {found.strerror}")
    record = describe_foreign(prefix, IndexedFiles(
        header.documents, header.bin_bytes // header.dtype.itemsize, header.dtype.name, *(one.size for one in states),
        tuple(shards), index))
    if record.inputs != states:
        raise IntegrityError(f"{prefix}: its files changed while they were read; try again when they are complete")
    return record


def describe_foreign(prefix: str | Path, files: IndexedFiles) -> Manifest:
    """The manifest of `files`, a pair that another tool wrote."""
    return manifests.describe(files, bytes_in=0, characters=0, skipped={}, tokenizer=None, settings=None,
                              inputs=_states(prefix))


def keep_record(prefix: str | Path, record: Manifest) -> bool:
    """Write it beside the data; False where the directory cannot be written (it is then computed each time)."""
    try:
        manifests.write(record_path(prefix), record)
    except OSError:
        return False
    return True


def manifest_of_foreign(prefix: str | Path) -> tuple[Manifest, str]:
    """The manifest of a pair without one, and what to say of it. The ranks of a node take turns: one hashes."""
    with taking_turns(idx_path(prefix)):
        record = read_record(prefix)
        if record and record.inputs == _states(prefix):
            where = f", as kept in {record_path(prefix)}"
        else:
            record = compute_record(prefix)
            where = f" computed, now kept in {record_path(prefix)}" if keep_record(prefix, record) else \
                " computed, not kept: its directory cannot be written"
    return record, (f"{prefix}: no manifest (another tool's file), so which tokenizer wrote it is not known; "
                    f"fingerprint {record.fingerprint[:12]}{where}")


def verify(prefix: str | Path) -> dict:
    """Is every byte still what was written? The `record` compared with, `shards` and `bytes` that were read, the
    `fingerprint`; `new`: nothing was recorded before, the hashes have only now been kept. Raises IntegrityError naming
    file and byte range of what differs or cannot be read. Sizes come first; headers and counts need no look: they are
    what was written if the bytes are."""
    own = manifest_path(prefix).exists()
    path = manifest_path(prefix) if own else record_path(prefix)
    manifest = manifests.read(prefix) if own else read_record(prefix)
    new = manifest is None
    if new:
        check_files(prefix)
        manifest = compute_record(prefix)
        if not keep_record(prefix, manifest):
            path = "nowhere: the directory cannot be written"
    else:
        _compare(prefix, manifest, path, "" if own else f" (as {path} says: delete that if the data was replaced)")
    return {"record": str(path), "new": new, "shards": len(manifest.shards),
            "bytes": manifest.bin_bytes + manifest.idx_bytes, "fingerprint": manifest.fingerprint}


def _compare(prefix: str | Path, manifest: Manifest, recorded_in: Path, hint: str) -> None:
    manifests.check_sizes(prefix, manifest, hint)
    parts = manifest.parts or (manifest.bin_bytes,)
    ranges = ranges_of(prefix, parts, manifest.shard_bytes)
    expected = [*manifest.shards, manifest.idx_sha256]
    if len(ranges) != len(expected) or sum(parts) != manifest.bin_bytes:
        raise IntegrityError(f"{recorded_in}: lists {len(manifest.shards)} shards, {bin_path(prefix)} has "
                             f"{len(ranges) - 1} of {manifest.shard_bytes} bytes: it is damaged; copy it again, or run "
                             "preprocess again")
    hashes = hash_ranges(ranges, f"verifying {prefix}")
    damaged = []
    for number, (one, wanted, found) in enumerate(zip(ranges, expected, hashes, strict=True), start=1):
        if found != wanted:
            which = f"shard {number} of {len(ranges) - 1}" if number < len(ranges) else "the whole file"
            unread = f" (cannot be read: {found.strerror})" if isinstance(found, OSError) else ""
            damaged.append(f"{one.path} bytes {one.start:,}..{one.end:,} ({which}){unread}")
    if damaged:
        more = f", and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise IntegrityError(f"{', '.join(damaged[:NAMED])}{more}: not the bytes that {recorded_in} recorded; copy "
                             "the data again, or run preprocess again")


def _states(prefix: str | Path) -> tuple[InputFile, InputFile]:
    """The pair as it is now, by suffix: it may be moved or renamed with its record."""
    states = {suffix: Path(f"{prefix}{suffix}").stat() for suffix in (".bin", ".idx")}
    return tuple(InputFile(suffix, state.st_size, state.st_mtime_ns) for suffix, state in states.items())
