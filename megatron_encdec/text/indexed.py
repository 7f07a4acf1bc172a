"""Megatron's indexed binary format, written as a stream and without torch.

`.bin` is the token ids of all documents, one after the other. `.idx`, little-endian, is

    9 bytes "MMIDIDX\\0\\0" · uint64 version 1 · uint8 dtype code · uint64 sequences n · uint64 n + 1
    int32 lengths_n (tokens) · int64 pointers_n (bytes into .bin) · int64 documents_(n+1), here 0..n

(the format of megatron.core.datasets.indexed_dataset; a document is one sequence here). Why not its
IndexedDatasetBuilder, whose bytes these are: it takes a torch tensor a document, keeps all lengths in memory (its tool
needs 12 times ours, docs/performance.md), cannot go on after a crash, and neither hashes nor fsyncs. Here lengths wait
in a file of their own until the index is put together. Letters: n documents.
"""

import contextlib
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import flush_to_disk

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32,
          8: np.uint16}
SHARD_SIZE = 64 << 20  # bytes of .bin under one hash
CHUNK = 1 << 18  # documents handled at once when the index is put together
PIECE = 8 << 20  # bytes of .bin handled at once
SYNC_BYTES = 128 << 20  # of .bin written before they are brought to disk in the background


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def token_dtype(vocabulary_size: int) -> np.dtype:
    """uint16 below 65 500 entries, else int32: Megatron's own rule."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


@dataclass(frozen=True)
class IndexedFiles:
    """What a finished writer wrote: sizes in bytes, hex sha256 per shard of `.bin` and of the `.idx`."""

    documents: int
    tokens: int
    dtype: str
    bin_bytes: int
    idx_bytes: int
    shards: tuple[str, ...]
    idx_sha256: str


class ShardHashes:
    """Hex sha256 of each shard of a `.bin` that comes piece by piece; `finished` holds those of whole shards."""

    def __init__(self):
        self.finished: list[str] = []
        self._digest, self._size = hashlib.sha256(), 0

    def copy(self) -> "ShardHashes":
        """One that goes on from here by itself."""
        other = ShardHashes()
        other.finished, other._digest, other._size = list(self.finished), self._digest.copy(), self._size
        return other

    def update(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while len(data):
            piece = data[: SHARD_SIZE - self._size]
            self._digest.update(piece)
            self._size += len(piece)
            data = data[len(piece):]
            if self._size == SHARD_SIZE:
                self.end_shard()

    def end_shard(self) -> None:
        """What follows is of a new shard."""
        if self._size:
            self.finished.append(self._digest.hexdigest())
            self._digest, self._size = hashlib.sha256(), 0


class IndexedWriter(contextlib.ExitStack):
    """Writes NAME.bin and NAME.idx in `folder`, with NAME.lengths for a while. A context manager; what stands in the
    folder stays there, for a later writer to `take_back`; `cut` drops the rest. Raises `UserError` if the place cannot
    be written."""

    def __init__(self, folder: str | Path, name: str, dtype: np.dtype):
        super().__init__()
        self.prefix, self.dtype = Path(folder, name), np.dtype(dtype)
        self.documents, self.tokens, self._hashes = 0, 0, ShardHashes()
        self._bin, self._lengths = self._open("bin"), self._open("lengths")
        self._syncing, self._synced, self._sync = self.enter_context(ThreadPoolExecutor(1)), 0, None

    @property
    def bin_bytes(self) -> int:
        return self.tokens * self.dtype.itemsize

    def append_file(self, path: Path, lengths_N: np.ndarray) -> None:
        """Add N documents: their ids are the file at `path` (read piece by piece), their lengths in tokens."""
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                self._bin.write(piece)
                self._hashes.update(piece)
                self.tokens += len(piece) // self.dtype.itemsize
                self._sync_now_and_then()
        self._append_lengths(lengths_N)

    def append_part(self, prefix: str | Path, shards: tuple[str, ...]) -> None:
        """Add a whole finished pair, whose shards' hashes are known: its bytes are copied, not hashed again. The grid
        of shards starts anew after it."""
        self._hashes.end_shard()
        header = read_header(prefix)
        with open(bin_path(prefix), "rb") as source:
            shutil.copyfileobj(source, self._bin, PIECE)
        self._hashes.finished += shards
        self.tokens += header.bin_bytes // self.dtype.itemsize
        if self._bin.tell() != self.bin_bytes:
            raise IntegrityError(f"{bin_path(prefix)}: changed while it was copied; copy it again")
        with open(idx_path(prefix), "rb") as index:
            index.seek(HEADER.size)
            for start in range(0, header.documents, CHUNK):
                count = min(CHUNK, header.documents - start)
                self._append_lengths(np.frombuffer(index.read(4 * count), "<i4"))

    def take_back(self, tokens: int, documents: int, sha256: str) -> ShardHashes | None:
        """Whether these `tokens` and `documents` follow in the files of an earlier writer: the hashes to `go_on` with,
        None if not. Changes nothing here."""
        digest, hashes = hashlib.sha256(), self._hashes.copy()
        left = tokens * self.dtype.itemsize
        self._bin.seek(self.bin_bytes)
        while left:
            piece = self._bin.read(min(left, PIECE))
            if not piece:
                return None
            digest.update(piece)
            hashes.update(piece)
            left -= len(piece)
        self._lengths.seek(4 * self.documents)
        lengths_N = np.frombuffer(self._lengths.read(4 * documents), "<i4")
        if digest.hexdigest() != sha256 or len(lengths_N) != documents or lengths_N.sum(dtype=np.int64) != tokens:
            return None
        return hashes

    def go_on(self, tokens: int, documents: int, hashes: ShardHashes) -> None:
        """Count what `take_back` found as written."""
        self._hashes = hashes
        self.tokens += tokens
        self.documents += documents

    def cut(self) -> None:
        """Drop what stands in the files after what was taken back; appending goes on there."""
        for file, size in ((self._bin, self.bin_bytes), (self._lengths, 4 * self.documents)):
            file.truncate(size)
            file.seek(size)

    def flush(self) -> None:
        """Hand everything to the system, so that it outlives this process."""
        self._bin.flush()
        self._lengths.flush()

    def finish(self) -> IndexedFiles:
        """Put the index together and bring everything to disk."""
        if self._sync:
            self._sync.result()  # an error of the disk is told once only
        flush_to_disk(self._bin)
        self._hashes.end_shard()
        digest, idx_bytes = hashlib.sha256(), 0
        file = self._open("idx")
        file.truncate(0)
        for piece in self._index_pieces():
            idx_bytes += file.write(piece)
            digest.update(piece)
        flush_to_disk(file)
        return IndexedFiles(self.documents, self.tokens, self.dtype.name, self.bin_bytes, idx_bytes,
                            tuple(self._hashes.finished), digest.hexdigest())

    def _append_lengths(self, lengths_N: np.ndarray) -> None:
        self._lengths.write(lengths_N.astype("<i4").tobytes())
        self.documents += len(lengths_N)

    def _sync_now_and_then(self) -> None:
        """Bring `.bin` to disk meanwhile, so that the end need not wait for all of it."""
        if self.bin_bytes - self._synced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
            if self._sync:
                self._sync.result()
            self._synced = self.bin_bytes
            self._sync = self._syncing.submit(os.fdatasync, self._bin.fileno())

    def _index_pieces(self) -> Iterator[bytes]:
        code = next(code for code, dtype in DTYPES.items() if self.dtype == dtype)
        yield HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1)
        self._lengths.flush()
        with open(f"{self.prefix}.lengths", "rb") as file:
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

    def _open(self, suffix: str) -> BinaryIO:
        path = f"{self.prefix}.{suffix}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot write the output: {error.strerror}") from None
        return self.enter_context(open(descriptor, "r+b"))


@dataclass(frozen=True)
class IndexHeader:
    """The head of an `.idx` and what follows: `bin_bytes` is the size its last sequence asks of `.bin`."""

    dtype: np.dtype
    sequences: int
    documents: int
    bin_bytes: int


def read_header(prefix: str | Path) -> IndexHeader:
    """Read `PREFIX.idx`'s header and last entry (a few bytes, whatever the size of the file). Raises `IntegrityError`
    naming the file if it is missing, foreign, or of another size than its counts ask."""
    path = idx_path(prefix)
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER.size)
            if len(head) < HEADER.size:
                check_size(path, HEADER.size)
            magic, version, code, sequences, documents = HEADER.unpack(head)
            if magic != MAGIC or version != 1 or code not in DTYPES:
                raise IntegrityError(f"{path}: not a Megatron index (magic {magic!r}, version {version}, "
                                     f"dtype code {code})")
            dtype = np.dtype(DTYPES[code])
            check_size(path, HEADER.size + 12 * sequences + 8 * documents)
            bin_bytes = 0
            if sequences:
                (length,) = struct.unpack("<i", os.pread(file.fileno(), 4, HEADER.size + 4 * (sequences - 1)))
                (pointer,) = struct.unpack("<q", os.pread(file.fileno(), 8, HEADER.size + 12 * sequences - 8))
                bin_bytes = pointer + length * dtype.itemsize
            return IndexHeader(dtype, sequences, documents - 1, bin_bytes)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; write it with megatron-encdec preprocess") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the index: {error.strerror}") from None


def check_size(path: Path, expected: int, hint: str = "") -> None:
    """Raises `IntegrityError` where the file is shorter or longer than it has to be."""
    found = path.stat().st_size
    if found != expected:
        what = "truncated" if found < expected else "has bytes appended"
        raise IntegrityError(f"{path}: {what}: expected {expected:,} bytes, found {found:,}; copy it again, or run "
                             f"preprocess again{hint}")
