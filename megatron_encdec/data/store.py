"""Tokens on disk, read in place: a Megatron .bin/.idx pair seen as one long row of tokens.

    1. `TokenStore.open(prefix)`  check the files against each other, map both
    2. `read(start, count)`       tokens by position in the row
    3. `document_ends(...)`       where documents end, by binary search in the mapped .idx

Opening takes constant time and memory whatever the size: the .idx stores each sequence's byte offset, which
is already a cumulative sum, so nothing is read ahead or added up. (A pair without a manifest is hashed once.)
The format is described in `text/indexed.py`; here a document may also be several sequences, as other tools
write it: the document indices are the first sequence of each document, then the number of sequences.
"""

import dataclasses
import hashlib
import json
import mmap
import os
from bisect import bisect_right
from pathlib import Path

import numpy as np

from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.rundir.files import sha256_file, write_json_atomic
from megatron_encdec.text.indexed import HEADER, SHARD_SIZE, bin_path, idx_path, read_header
from megatron_encdec.text.manifest import check_files, data_fingerprint


class TokenStore:
    """One .bin/.idx pair; safe to read from several threads."""

    def __init__(self, prefix: str | Path):
        """Open PREFIX.bin and PREFIX.idx; see `open`."""
        self.prefix = Path(prefix)
        manifest, header = check_files(prefix), read_header(prefix)
        self.dtype, self.documents = header.dtype, header.documents
        # The header is 34 bytes long, so these views are unaligned: read elements of them, never the whole.
        idx_bytes, offsets_at = _map(idx_path(prefix)), HEADER.size + 4 * header.sequences
        self._offsets_N = np.frombuffer(idx_bytes, "<i8", header.sequences, offsets_at)
        self._documents_D = np.frombuffer(idx_bytes, "<i8", offset=offsets_at + 8 * header.sequences)
        self._tokens = np.frombuffer(_map(bin_path(prefix)), self.dtype.newbyteorder("<"))
        self.tokens = len(self._tokens)
        self._check_index()
        self.tokenizer = dataclasses.asdict(manifest.tokenizer) if manifest else None
        self.fingerprint = manifest.fingerprint if manifest else self._hash_once()

    @classmethod
    def open(cls, prefix: str | Path) -> "TokenStore":
        """The store at PREFIX.bin, PREFIX.idx and, if there, PREFIX.manifest.json.

        `tokens`, `documents`, `dtype`, `fingerprint` and `tokenizer` (the manifest's record, None without
        one) describe it. Raises IntegrityError, with expected and found bytes, where a file is missing or
        truncated, or where the three disagree.
        """
        return cls(prefix)

    def __reduce__(self):
        return TokenStore.open, (self.prefix,)  # a worker process maps the files itself; no token is copied

    def read(self, start: int, count: int) -> np.ndarray:
        """tokens_C (int64): `count` tokens from position `start` of the row."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"{bin_path(self.prefix)}: tokens {start}..{start + count} of {self.tokens}")
        return self._tokens[start : start + count].astype(np.int64)

    def document_ends(self, start: int, count: int) -> np.ndarray:
        """Positions e in (0, count], ascending (int64): token start + e - 1 is the last of its document.

        Empty documents end nowhere. Cost: two binary searches.
        """
        boundaries = range(len(self._documents_D))  # boundary d: where document d starts and d - 1 ended
        first = bisect_right(boundaries, start, key=self._boundary)
        beyond = bisect_right(boundaries, start + count, lo=first, key=self._boundary)
        sequences = self._documents_D[first:beyond]
        last = len(self._offsets_N)
        ends = np.full(beyond - first, self.tokens, dtype=np.int64)  # where the last document ends
        inside = sequences < last
        ends[inside] = self._offsets_N[sequences[inside]] // self.dtype.itemsize
        ends -= start
        return ends[np.diff(ends, prepend=0) > 0]

    def _boundary(self, document: int) -> int:
        sequence = int(self._documents_D[document])
        if sequence == len(self._offsets_N):
            return self.tokens
        return int(self._offsets_N[sequence]) // self.dtype.itemsize

    def _check_index(self) -> None:
        path, sequences = idx_path(self.prefix), len(self._offsets_N)
        if self.dtype.kind not in "iu":
            raise IntegrityError(f"{path}: says that tokens are {self.dtype}; they must be integers")
        if (self.documents < 0 or self._documents_D[0] != 0 or self._documents_D[-1] != sequences
                or (sequences and self._offsets_N[0] != 0)):
            raise IntegrityError(f"{path}: its document indices do not run from 0 to its {sequences} "
                                 "sequences, or its first sequence is not at byte 0; run preprocess again")

    def _hash_once(self) -> str:
        """What a manifest would say, kept in PREFIX.fingerprint.json while sizes and times stand."""
        path, now = Path(f"{self.prefix}.fingerprint.json"), {}
        for file in (bin_path(self.prefix), idx_path(self.prefix)):
            status = os.stat(file)
            now[file.suffix[1:]] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["files"] == now and isinstance(kept["fingerprint"], str):
                return kept["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # absent or damaged: only a cache, computed again below
        bin_bytes = self._tokens.view(np.uint8)
        shards = tuple(hashlib.sha256(bin_bytes[start : start + SHARD_SIZE]).hexdigest()
                       for start in range(0, len(bin_bytes), SHARD_SIZE))
        fingerprint = data_fingerprint(shards, sha256_file(idx_path(self.prefix)))
        try:
            write_json_atomic(path, {"fingerprint": fingerprint, "files": now})
        except OSError:
            pass  # a read-only directory: hash again next time
        return fingerprint


def _map(path: Path) -> mmap.mmap | bytes:
    """The file's bytes, mapped read-only (an empty file cannot be mapped)."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise IntegrityError(f"{path}: cannot read: {error.strerror}") from None
