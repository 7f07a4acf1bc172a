"""Tokens on disk, read in place: a Megatron .bin/.idx pair seen as one long row of tokens.

    1. `TokenStore(prefix)`     check the files against each other
    2. `read(start, count)`     tokens by position in the row
    3. `document_ends(...)`     where documents end, searched in the .idx: `Column.between`

Opening takes constant time and memory whatever the size: the .idx stores each sequence's byte offset, which
is already a cumulative sum, so nothing is read ahead or added up. (A pair without a manifest is hashed once.)
The format is described in `text/indexed.py`; here a document may also be several sequences, as other tools
write it: the document indices are the first sequence of each document, then the number of sequences.

Files are read by `pread`, never mapped: pages of a mapped index would count as this process's memory, and a file cut
short under a mapping kills the process where a read can say what is wrong.
"""

import os
import sys
import weakref
from bisect import bisect_right
from pathlib import Path

import numpy as np

from megatron_encdec.data.fingerprint import manifest_of_foreign
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.text.indexed import HEADER, bin_path, idx_path, read_header
from megatron_encdec.text.manifest import check_files, writing_command

BLOCK = 512  # entries read at once: 4 KiB, a page or two
GUESSES = 6
FROM_THE_ENDS = 2  # of these


class TokenStore:
    """One .bin/.idx pair; safe to read from several threads and after a fork. `tokenizer` is a `TokenizerRecord`, None
    where another tool wrote the pair; `note` what to say of one without a manifest."""

    def __init__(self, prefix: str | Path):
        """The store at PREFIX.bin, PREFIX.idx and, if there, PREFIX.manifest.json. Raises IntegrityError, with expected
        and found bytes, where a file is missing or truncated, or where the three disagree."""
        self.prefix = Path(prefix)
        manifest, header = check_files(prefix), read_header(prefix)
        self.dtype, self.documents = header.dtype, header.documents
        self._sequences, self._bin_bytes = header.sequences, header.bin_bytes
        self.tokens = header.bin_bytes // self.dtype.itemsize
        self._bin_path, path = bin_path(prefix), idx_path(prefix)
        self._bin, index = self._open(self._bin_path), self._open(path)
        offsets_at = HEADER.size + 4 * header.sequences
        self._offsets_N = Column(path, index, offsets_at, header.sequences)
        self._documents_D = Column(path, index, offsets_at + 8 * header.sequences, header.documents + 1)
        self._check_index()
        manifest, self.note = (manifest, None) if manifest else manifest_of_foreign(prefix)
        self.fingerprint, self.tokenizer = manifest.fingerprint, manifest.tokenizer

    def __reduce__(self):
        return TokenStore, (self.prefix,)  # a worker process opens the files itself; no token is copied

    def read(self, start: int, count: int) -> np.ndarray:
        """tokens_C (int64): `count` tokens from position `start` of the row."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"{self._bin_path}: tokens {start}..{start + count} of {self.tokens}")
        size = self.dtype.itemsize
        data = read_bytes(self._bin_path, self._bin, start * size, count * size)
        return np.frombuffer(data, self.dtype).astype(np.int64)

    def document_ends(self, start: int, count: int) -> np.ndarray:
        """Positions e in (0, count], ascending (int64): token start + e - 1 is the last of its document. Empty
        documents end nowhere. Cost: two interpolation searches, a few blocks of 4 KiB."""
        if count <= 0 or not self.tokens:
            return np.zeros(0, dtype=np.int64)
        size, at_end = self.dtype.itemsize, start + count >= self.tokens
        # The M sequences from number `first` on begin after `start` and not after start + count.
        first, offsets_M = self._offsets_N.between(start * size, (start + count) * size, 0, self._bin_bytes)
        # So do K of the document indices; the one that is the number of sequences stands for the data's end.
        last = first + len(offsets_M) - 1 + at_end
        _, sequences_K = self._documents_D.between(first - 1, last, 0, self._sequences)
        places_M = np.append(offsets_M, self._bin_bytes) if at_end else offsets_M
        places_K = sequences_K - first
        if not len(places_K):
            return places_K
        if places_K.min() < 0 or places_K.max() >= len(places_M):
            raise self._disorder(start)
        ends_K = places_M[places_K] // size - start
        lengths = ends_K[1:] - ends_K[:-1]
        if ends_K[0] <= 0 or ends_K[-1] > count or (len(lengths) and lengths.min() < 0):
            raise self._disorder(start)
        return ends_K if lengths.all() else np.append(ends_K[:1], ends_K[1:][lengths > 0])

    def _disorder(self, start: int) -> IntegrityError:
        return IntegrityError(f"{idx_path(self.prefix)}: its entries are out of order near token {start:,}: damaged; "
                              f"`megatron-encdec inspect data {self.prefix} --verify` reads all of it")

    def _open(self, path: Path) -> int:
        """A file descriptor, closed with the store; told that reads jump about (or the kernel reads megabytes)."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise IntegrityError(f"{path}: cannot read: {error.strerror}") from None
        weakref.finalize(self, os.close, descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor

    def _check_index(self) -> None:
        path, sequences = idx_path(self.prefix), self._sequences
        if self.dtype.kind not in "iu":
            raise IntegrityError(f"{path}: says that tokens are {self.dtype}; they must be integers")
        if (self.documents < 0 or self._documents_D.read(0, 1)[0] != 0
                or self._documents_D.read(self.documents, 1)[0] != sequences
                or (sequences and self._offsets_N.read(0, 1)[0] != 0)):
            raise IntegrityError(f"{path}: its document indices do not run from 0 to its {sequences} "
                                 "sequences, or its first sequence is not at byte 0; run preprocess again")


class AbsentStore:
    """A source whose files are gone, and that is not read any more. fingerprint: as the run recorded it. key: what
    names it in the config."""

    tokenizer = note = None
    tokens = sys.maxsize  # how many there were is not known, and nothing is numbered by it

    def __init__(self, prefix: str | Path, fingerprint: str, key: str):
        self.prefix, self.fingerprint, self.key = Path(prefix), fingerprint, key

    def refusal(self, why: str) -> IntegrityError:
        """The error where it is needed after all."""
        return IntegrityError(f"{self.key}: {self.prefix}: its files are gone, and {why}; copy them again, or write "
                              f"them with {writing_command(self.prefix)}")

    def read(self, start: int, count: int) -> np.ndarray:
        """Always an IntegrityError, as from `document_ends`."""
        raise self.refusal("what is asked for stood there")

    document_ends = read


class Column:
    """A sorted column of integers in a file, searched without holding any of it in memory: `count` int64 entries in the
    machine's byte order (little-endian, as Megatron's reader assumes too), ascending (equal ones allowed), from byte
    `offset` of `path`; `descriptor` is the open file's, closed by who opened it."""

    def __init__(self, path: Path, descriptor: int, offset: int, count: int):
        self._path, self._descriptor, self._offset, self.count = path, descriptor, offset, count

    def read(self, first: int, count: int) -> np.ndarray:
        """Entries first .. first + count - 1 (int64)."""
        return np.frombuffer(self._bytes(first, count), np.int64)

    def between(self, above: int, upto: int, least: int, most: int) -> tuple[int, np.ndarray]:
        """(number of the first entry > `above`, the entries from there on that are <= `upto`). `least` is the first
        entry, `most` something that no entry is above: the nearer the last, the quicker.

        An interpolation search: it guesses where a value stands and reads one block there, twice from the values at
        both ends of what is left, then from the slope of the block just read. Where document lengths are drawn from one
        law, two blocks find it among 100 million documents; where they drift, as in a corpus sorted by length, some
        six. After `GUESSES` it halves every other time, so that the most uneven column takes some 2 * log2(n / BLOCK).
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
