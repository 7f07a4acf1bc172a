"""Tokens on disk, read in place: a Megatron .bin/.idx pair seen as one long row of tokens.

    1. `TokenStore(prefix)`     check the files against each other
    2. `read(start, count)`     tokens by position in the row
    3. `document_ends(...)`     where documents end, searched in the .idx

Opening takes constant time and memory whatever the size: the .idx stores each sequence's byte offset, which
is already a cumulative sum, so nothing is read ahead or added up. (A pair without a manifest is hashed once.)
The format is described in `text/indexed.py`; here a document may also be several sequences, as other tools
write it: the document indices are the first sequence of each document, then the number of sequences.
"""

import os
import weakref
from pathlib import Path

import numpy as np

from megatron_encdec.data.column import Column, read_bytes
from megatron_encdec.data.fingerprint import manifest_of_foreign
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.text.indexed import HEADER, bin_path, idx_path, read_header
from megatron_encdec.text.manifest import check_files


class TokenStore:
    """One .bin/.idx pair; safe to read from several threads and after a fork.

    `tokenizer` is a `TokenizerRecord`, None where another tool wrote the pair; `note` what to say of one without a
    manifest.
    """

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
        """Positions e in (0, count], ascending (int64): token start + e - 1 is the last of its document.

        Empty documents end nowhere. Cost: two interpolation searches, a few blocks of 4 KiB.
        """
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
