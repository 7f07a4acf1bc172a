"""A sorted column of integers in a file, searched without holding any of it in memory.

    1. `Column.read(first, count)`     some entries
    2. `Column.between(above, upto)`   the run of entries in an interval: an interpolation search, a block at a time

Entries are read by `pread`, never mapped: pages of a mapped index would count as this process's memory, and a file cut
short under a mapping kills the process where a read can say what is wrong.

The search guesses where a value stands and reads one block there: twice from the values at both ends of what is left,
then from the slope of the block just read. Where document lengths are drawn from one law, two blocks find it among 100
million documents; where they drift, as in a corpus sorted by length, some six. After `GUESSES` it halves every other
time, so that the most uneven column takes some 2 * log2(n / BLOCK).
"""

import os
from bisect import bisect_right
from pathlib import Path

import numpy as np

from megatron_encdec.platform.errors import IntegrityError

BLOCK = 512  # entries read at once: 4 KiB, a page or two
GUESSES = 6
FROM_THE_ENDS = 2  # of these


class Column:
    """`count` int64 entries in the machine's byte order (little-endian, as Megatron's reader assumes too), ascending
    (equal ones allowed), from byte `offset` of `path`; `descriptor` is the open file's, closed by who opened it."""

    def __init__(self, path: Path, descriptor: int, offset: int, count: int):
        self._path, self._descriptor, self._offset, self.count = path, descriptor, offset, count

    def read(self, first: int, count: int) -> np.ndarray:
        """Entries first .. first + count - 1 (int64)."""
        return np.frombuffer(self._bytes(first, count), np.int64)

    def between(self, above: int, upto: int, least: int, most: int) -> tuple[int, np.ndarray]:
        """(number of the first entry > `above`, the entries from there on that are <= `upto`).

        `least` is the first entry, `most` something that no entry is above: the nearer the last, the quicker.
        """
        low, high, steps = 0, self.count, 0  # entries before low are <= above, from high on they are beyond it
        at, value, slope = low, least, (most - least) / max(self.count, 1)
        while low < high:
            start, left = low, high - low
            if left > BLOCK:
                guess = low + left // 2
                if slope > 0 and (steps < GUESSES or steps % 2):
                    guess = at + int((above - value) / slope)
                start = min(max(guess - BLOCK // 2, low), high - BLOCK)
            data = self._bytes(start, min(BLOCK, left))
            block = memoryview(data).cast("q")
            if block[0] > above and start > low:
                high, most = at, value = start, block[0]
            elif block[-1] <= above:
                low, least = at, value = start + len(block), block[-1]
            else:
                first = bisect_right(block, above)
                return start + first, self._run(data, start, first, upto)
            steps += 1
            slope = (block[-1] - block[0]) / len(block)
            if steps < FROM_THE_ENDS and low < high:
                slope = (most - least) / (high - low)
        return low, self._run(b"", low, 0, upto)  # between two blocks, or after the last entry

    def _run(self, data: bytes, start: int, first: int, upto: int) -> np.ndarray:
        """Entries <= `upto` from number start + first on; `data` are those from number `start` on."""
        block = np.frombuffer(data, np.int64)
        beyond = bisect_right(memoryview(data).cast("q"), upto, first)
        if beyond < len(block):
            return block[first:beyond]
        pieces, at, step = [block[first:]], start + len(block), max(len(block), 64)
        while at < self.count and beyond == len(block):
            step = min(2 * step, self.count - at)
            block = self.read(at, step)
            beyond = int(block.searchsorted(upto, "right"))
            pieces.append(block[:beyond])
            at += step
        return np.concatenate(pieces)

    def _bytes(self, first: int, count: int) -> bytes:
        return read_bytes(self._path, self._descriptor, self._offset + 8 * first, 8 * count)


def read_bytes(path: Path, descriptor: int, offset: int, count: int) -> bytes:
    """Exactly `count` bytes of the open file; an IntegrityError names it where it has become shorter."""
    try:
        data = os.pread(descriptor, count, offset)
        while len(data) < count and (more := os.pread(descriptor, count - len(data), offset + len(data))):
            data += more  # one call returns at most 2 GiB
    except OSError as error:
        raise IntegrityError(f"{path}: cannot read bytes {offset:,}..{offset + count:,}: {error.strerror}") from None
    if len(data) < count:
        raise IntegrityError(f"{path}: has become shorter since it was opened: no bytes "
                             f"{offset + len(data):,}..{offset + count:,}; copy it again, or run preprocess again")
    return data
