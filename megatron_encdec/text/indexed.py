"""Megatron's indexed binary format, written as a stream and without torch.

    1. `IndexedWriter(prefix, dtype)`   `append` documents, `finish` (everything on disk), `publish` (renamed)
    2. `read_header(path)`              what an `.idx` file says about itself

`.bin` is the token ids of all documents, one after the other. `.idx`, little-endian, is

    9 bytes "MMIDIDX\\0\\0" · uint64 version 1 · uint8 dtype code · uint64 sequences n · uint64 n + 1
    int32 lengths_n (tokens) · int64 pointers_n (bytes into .bin) · int64 documents_(n+1), here 0..n

(the format of megatron.core.datasets.indexed_dataset; a document is one sequence here). Memory stays flat:
lengths wait in a file of their own until the index is put together. Letters: n documents.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import fsync_directory, replace_durably

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32,
          8: np.uint16}
SHARD_SIZE = 64 << 20  # bytes of .bin under one hash
CHUNK = 1 << 18  # documents handled at once when the index is put together


def bin_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`."""
    return Path(f"{prefix}.idx")


def token_dtype(vocabulary_size: int) -> np.dtype:
    """uint16 below 65 500 entries, else int32: Megatron's own rule."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


@dataclass(frozen=True)
class IndexedFiles:
    """What a finished writer wrote: sizes in bytes, hex sha256 per shard of `.bin` and of the `.idx`."""

    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    shards: tuple[str, ...]
    idx_sha256: str


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx` under temporary names until `publish`; a context manager.

    Left without `publish` (an error, Ctrl-C), it takes its temporary files away. Raises `UserError` if the
    place cannot be written or another process is writing the same prefix.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        self.documents = self.tokens = 0
        self._shards: list[str] = []
        self._digest, self._digested = hashlib.sha256(), 0
        self._files = contextlib.ExitStack()
        self._temporary = {final: final.with_name(f".{final.name}.tmp")
                           for final in (bin_path(prefix), idx_path(prefix))}
        self._lengths_path = self._temporary[idx_path(prefix)].with_suffix(".lengths.tmp")
        self._bin = self._open(self._temporary[bin_path(prefix)])
        self._lengths = self._open(self._lengths_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for path in (*self._temporary.values(), self._lengths_path):
            path.unlink(missing_ok=True)
        self._files.close()

    def append(self, tokens_T: np.ndarray, lengths_N: np.ndarray) -> None:
        """Add N documents: their ids in one row (T = sum of lengths, writer's dtype), their lengths."""
        if tokens_T.dtype != self.dtype or tokens_T.size != lengths_N.sum():
            raise ValueError(f"{tokens_T.size} ids of {tokens_T.dtype} for {lengths_N.sum()} of {self.dtype}")
        data = memoryview(np.ascontiguousarray(tokens_T)).cast("B")
        self._bin.write(data)
        self._hash(data)
        self._lengths.write(lengths_N.astype("<i4").tobytes())
        self.documents += len(lengths_N)
        self.tokens += tokens_T.size

    def finish(self) -> IndexedFiles:
        """Put the index together and bring everything to disk, still under temporary names."""
        _flush_to_disk(self._bin)
        if self._digested:
            self._shards.append(self._digest.hexdigest())
        temporary, digest = self._temporary[idx_path(self.prefix)], hashlib.sha256()
        file = self._open(temporary)
        for piece in self._index_pieces():
            file.write(piece)
            digest.update(piece)
        _flush_to_disk(file)
        return IndexedFiles(self.documents, self.tokens, self.tokens * self.dtype.itemsize,
                            temporary.stat().st_size, tuple(self._shards), digest.hexdigest())

    def retract(self) -> None:
        """Take an older `.idx` away: now no crash can leave an old file paired with a new one."""
        idx_path(self.prefix).unlink(missing_ok=True)
        fsync_directory(self.prefix.parent)

    def publish(self) -> None:
        """Give the finished files their names, the `.idx` last."""
        self.retract()
        for final, temporary in self._temporary.items():
            replace_durably(temporary, final)
        self._temporary = {}  # nothing left to take away: these names may already be another process's

    def _hash(self, data: memoryview) -> None:
        while len(data):
            piece = data[: SHARD_SIZE - self._digested]
            self._digest.update(piece)
            self._digested += len(piece)
            data = data[len(piece):]
            if self._digested == SHARD_SIZE:
                self._shards.append(self._digest.hexdigest())
                self._digest, self._digested = hashlib.sha256(), 0

    def _index_pieces(self) -> Iterator[bytes]:
        code = next(code for code, dtype in DTYPES.items() if self.dtype == dtype)
        yield HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1)
        self._lengths.flush()
        with open(self._lengths_path, "rb") as file:
            while piece := file.read(4 * CHUNK):
                yield piece
            file.seek(0)
            pointer = 0
            while piece := file.read(4 * CHUNK):
                ends_N = pointer + np.cumsum(np.frombuffer(piece, "<i4"), dtype="<i8") * self.dtype.itemsize
                yield np.concatenate([[pointer], ends_N[:-1]]).astype("<i8").tobytes()
                pointer = int(ends_N[-1])
        for start in range(0, self.documents + 1, CHUNK):
            yield np.arange(start, min(start + CHUNK, self.documents + 1), dtype="<i8").tobytes()

    def _open(self, path: Path) -> BinaryIO:
        """Open for writing, alone: the fixed temporary name lets the next run clean up after a killed one."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # noqa: SIM115  (closed by the stack; "wb" would empty it before the lock)
            self._files.enter_context(file)
        except OSError as error:
            raise UserError(f"{path}: cannot write the output: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._files.close()
                raise UserError(f"{self.prefix}: another process is writing this output; wait for it, or "
                                f"name another --output") from None
            # else: a file system without locks
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            self._files.close()
            raise UserError(f"{self.prefix}: another process has just written this output; run again")
        file.truncate(0)
        return file


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class IndexHeader:
    """The head of an `.idx` and what follows: `bin_bytes` is the size its last sequence asks of `.bin`."""

    dtype: np.dtype
    sequences: int
    documents: int
    idx_bytes: int
    bin_bytes: int


def read_header(prefix: str | Path) -> IndexHeader:
    """Read `PREFIX.idx`'s header and last entry (a few bytes, whatever the size of the file).

    Raises `IntegrityError` naming the file if it is missing, foreign, or of another size than its counts ask.
    """
    path = idx_path(prefix)
    try:
        found = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER.size)
            if len(head) < HEADER.size:
                raise size_error(path, HEADER.size, found)
            magic, version, code, sequences, documents = HEADER.unpack(head)
            if magic != MAGIC or version != 1 or code not in DTYPES:
                raise IntegrityError(f"{path}: not a Megatron index (magic {magic!r}, version {version}, "
                                     f"dtype code {code})")
            dtype = np.dtype(DTYPES[code])
            expected = HEADER.size + 12 * sequences + 8 * documents
            if found != expected:
                raise size_error(path, expected, found)
            bin_bytes = _bin_bytes(file, sequences, dtype.itemsize)
            return IndexHeader(dtype, sequences, documents - 1, found, bin_bytes)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; write it with megatron-encdec preprocess") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the index: {error.strerror}") from None


def _bin_bytes(file: BinaryIO, sequences: int, itemsize: int) -> int:
    if sequences == 0:
        return 0
    file.seek(HEADER.size + 4 * (sequences - 1))
    (length,) = struct.unpack("<i", file.read(4))
    file.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
    (pointer,) = struct.unpack("<q", file.read(8))
    return pointer + length * itemsize


def size_error(path: Path, expected: int, found: int) -> IntegrityError:
    """The error for a file that is shorter or longer than it has to be."""
    what = "truncated" if found < expected else "has bytes appended"
    return IntegrityError(f"{path}: {what}: expected {expected:,} bytes, found {found:,}; copy it again, or "
                          f"run preprocess again")
