"""Token files for the tests of this room, written byte by byte from the format's description."""

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_encdec.data.fingerprint import ranges_of
from megatron_encdec.text.indexed import SHARD_SIZE, IndexedFiles, read_header
from megatron_encdec.text.manifest import Manifest, Settings, TokenizerRecord, describe, manifest_path, write

CODES = {"uint16": 8, "int32": 4}


def _write_pair(prefix: Path, documents: list[list[int]], dtype: str = "uint16",
                sequences_each: int = 1) -> Path:
    """PREFIX.bin and PREFIX.idx of `documents`, each stored as `sequences_each` sequences."""
    sequences = [part.tolist() for document in documents
                 for part in np.array_split(np.array(document, dtype=int), sequences_each)]
    lengths = [len(sequence) for sequence in sequences]
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=dtype)
    offsets = (np.cumsum([0, *lengths])[:-1] * tokens.itemsize).astype("<i8")
    first_of_document = np.arange(0, len(sequences) + 1, sequences_each, dtype="<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[dtype], len(sequences), len(documents) + 1)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    Path(f"{prefix}.idx").write_bytes(header + np.array(lengths, dtype="<i4").tobytes() + offsets.tobytes()
                                      + first_of_document.tobytes())
    return prefix


@pytest.fixture(scope="session")
def write_pair():
    """The writer: write_pair(prefix, documents, dtype="uint16", sequences_each=1) -> prefix."""
    return _write_pair


def _write_manifest(prefix: Path, tokenizer: str = "t", shard_bytes: int = SHARD_SIZE, **changes) -> Manifest:
    pair = [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]
    header = read_header(prefix)
    ranges = ranges_of(prefix, changes.get("parts", (len(pair[0]),)), shard_bytes)[:-1]
    shards = tuple(hashlib.sha256(pair[0][one.start : one.end]).hexdigest() for one in ranges)
    files = IndexedFiles(header.documents, len(pair[0]) // header.dtype.itemsize, header.dtype.name, len(pair[0]),
                         len(pair[1]), shards, hashlib.sha256(pair[1]).hexdigest())
    manifest = describe(files, bytes_in=1, characters=1, skipped={}, inputs=(),
                        tokenizer=TokenizerRecord(tokenizer, 60000, 0, None),
                        settings=Settings("text", 0.0, "train"))
    manifest = replace(manifest, shard_bytes=shard_bytes, **changes)
    write(manifest_path(prefix), manifest)
    return manifest


@pytest.fixture(scope="session")
def write_manifest():
    """write_manifest(prefix, tokenizer="t", shard_bytes=..., parts=...) -> manifest; of 1-sequence documents."""
    return _write_manifest


@pytest.fixture
def corpus(tmp_path):
    """A prefix with 60 documents of 0..40 tokens, token k of the row having the id k mod 60000."""
    lengths = np.random.default_rng(0).integers(0, 41, size=60)
    row, documents = iter(range(10**6)), []
    for length in lengths:
        documents.append([next(row) % 60000 for _ in range(length)])
    return _write_pair(tmp_path / "corpus", documents), documents
