"""The ranges of bytes that a manifest has hashes of, and their hashes on all cores.

    1. `ranges_of(prefix, parts, shard_bytes)`   the shards of a .bin, pieces of a fixed size, and the whole .idx
    2. `hash_ranges(ranges)`                     sha256 of each, in threads: hashing does without the interpreter's lock
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from megatron_encdec.platform.children import available_cores
from megatron_encdec.platform.progress import Progress
from megatron_encdec.text.indexed import bin_path, idx_path

PIECE = 1 << 20  # bytes read at once by each thread


class Range(NamedTuple):
    """Bytes start .. end - 1 of a file."""

    path: Path
    start: int
    end: int


def ranges_of(prefix: str | Path, parts: Sequence[int], shard_bytes: int) -> list[Range]:
    """What a fingerprint covers: each shard of a `.bin` that was merged from `parts` (bytes each), then the `.idx`.

    A shard never crosses from one part into the next: merging keeps the hashes of what is merged.
    """
    ranges, part_start = [], 0
    for part in parts:
        part_end = part_start + part
        ranges += [Range(bin_path(prefix), start, min(start + shard_bytes, part_end))
                   for start in range(part_start, part_end, shard_bytes)]
        part_start = part_end
    return [*ranges, Range(idx_path(prefix), 0, idx_path(prefix).stat().st_size)]


def hash_ranges(ranges: Sequence[Range], label: str) -> list[str | OSError]:
    """Hex sha256 of each range, or the error that reading it gave; on all cores, with a progress line."""
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
