"""`PREFIX.manifest.json`: what went into the data, what came out, and how to recognise it.

    1. `describe(...)`          what a writer wrote -> `Manifest`
    2. `write`, `read`          to and from JSON
    3. `check_files(prefix)`    do `.bin`, `.idx` and manifest belong together? In milliseconds at any size

The data's fingerprint is the hash of the list of its shards' hashes, with the index's hash at the end: merged
or copied shards keep their hashes, and any changed byte changes the fingerprint. The manifest depends on
nothing but inputs, settings and installed encoder (no times, no worker count): equal runs write equal ones.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.platform.schema import build, to_dict
from megatron_encdec.rundir.files import refuse_pointer, write_json_atomic
from megatron_encdec.text.indexed import SHARD_SIZE, IndexedFiles, bin_path, idx_path, read_header, size_error


@dataclass(frozen=True)
class Skipped:
    """Documents left out for one reason: how many, and "file:line" of the first few."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer the ids belong to."""

    fingerprint: str
    vocabulary_size: int
    eod_id: int
    mask_id: int | None


@dataclass(frozen=True)
class InputRecord:
    """An input file as it was when read."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class EncoderRecord:
    """The library that encoded the text, and on how much of it, at the start, it was compared with the tokenizer."""

    name: str
    version: str
    compared_documents: int
    compared_characters: int


@dataclass(frozen=True)
class Settings:
    """What else decided the content. `split` is `train`, or `validation` for the documents drawn aside; `shard` "i/n"
    says which part of the inputs this is, "1/1" all of them."""

    text_key: str
    validation_percent: float
    split: str
    shard: str = "1/1"


@dataclass(frozen=True)
class Manifest:
    """The record beside a `.bin/.idx` pair.

    `bytes_in`: bytes of decompressed input that these documents (and the skipped ones) took; with the
    validation split's they add up to the inputs. `characters`: of the documents' texts. `tokens`: with one
    end of document each. Skipped documents are counted with the train split. `shard_bytes`: bytes of `.bin`
    under one hash. `parts`: bytes of `.bin` from each merged output (empty: it is all one); the shards of each begin
    anew, and the last of each may be shorter. `encoder`: None in data of earlier versions. `unproven_cuts`: places
    in very long documents where the text had to be cut for the tokenizer without proof that it makes no difference.
    """

    documents: int
    tokens: int
    bytes_in: int
    characters: int
    skipped: dict[str, Skipped]
    dtype: str
    tokenizer: TokenizerRecord
    settings: Settings
    bin_bytes: int
    idx_bytes: int
    shard_bytes: int
    shards: tuple[str, ...]
    idx_sha256: str
    fingerprint: str
    inputs: tuple[InputRecord, ...]
    parts: tuple[int, ...] = ()
    encoder: EncoderRecord | None = None
    unproven_cuts: int = 0


def manifest_path(prefix: str | Path) -> Path:
    """`PREFIX.manifest.json`."""
    return Path(f"{prefix}.manifest.json")


def data_fingerprint(shards: tuple[str, ...], idx_sha256: str) -> str:
    """Hex sha256 over the hashes of the shards and of the index, one a line."""
    return hashlib.sha256("\n".join([*shards, idx_sha256]).encode()).hexdigest()


def describe(files: IndexedFiles, dtype: str, **facts) -> Manifest:
    """The manifest of finished `files`; `facts` are the fields that the files themselves do not tell."""
    return Manifest(documents=files.documents, tokens=files.tokens, dtype=dtype, bin_bytes=files.bin_bytes,
                    idx_bytes=files.idx_bytes, shard_bytes=SHARD_SIZE, shards=files.shards,
                    idx_sha256=files.idx_sha256, fingerprint=data_fingerprint(files.shards, files.idx_sha256),
                    **facts)


def write(prefix: str | Path, manifest: Manifest) -> None:
    """Write `PREFIX.manifest.json`, whole or not at all."""
    write_json_atomic(manifest_path(prefix), to_dict(manifest))


def read(prefix: str | Path) -> Manifest:
    """Read `PREFIX.manifest.json`; a `UserError` names the file if it is missing or malformed."""
    path = manifest_path(prefix)
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = build(Manifest, content)
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest; preprocess writes it last") from None
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path}: not a manifest of preprocess ({error}); run preprocess again") from None
    if manifest.fingerprint != data_fingerprint(manifest.shards, manifest.idx_sha256):
        raise IntegrityError(f"{path}: its fingerprint is not the hash of its shards' list; preprocess again")
    return manifest


def check_files(prefix: str | Path) -> Manifest | None:
    """Check sizes, header and counts of `.bin` and `.idx` against each other and the manifest.

    Returns the manifest, None where there is none (data that another tool wrote). Reads a few bytes, so
    altered content of the right size is not seen. Raises `IntegrityError` naming the file that is missing,
    truncated or appended to, with the expected and found bytes.
    """
    manifest = read(prefix) if manifest_path(prefix).exists() else None
    sizes = {}
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; write it with preprocess --output {prefix}")
        refuse_pointer(path)
        sizes[path] = path.stat().st_size
    if manifest:
        for path, expected in zip(sizes, (manifest.bin_bytes, manifest.idx_bytes), strict=True):
            if sizes[path] != expected:
                raise size_error(path, expected, sizes[path])
    header = read_header(prefix)
    found = sizes[bin_path(prefix)]
    if header.bin_bytes != found and manifest:  # which vouches for the size of .bin
        raise IntegrityError(f"{idx_path(prefix)}: altered: its last document ends at byte {header.bin_bytes:,} of "
                             f"{found:,}; copy it again, or run preprocess again")
    if header.bin_bytes != found:
        raise size_error(bin_path(prefix), header.bin_bytes, found)
    if manifest:
        _check_counts(prefix, manifest, header)
    return manifest


def _check_counts(prefix: str | Path, manifest: Manifest, header) -> None:
    tokens = header.bin_bytes // header.dtype.itemsize
    for what, expected, found in (("documents", manifest.documents, header.documents),
                                  ("sequences", manifest.documents, header.sequences),
                                  ("tokens", manifest.tokens, tokens),
                                  ("dtype", manifest.dtype, header.dtype.name)):
        if expected != found:
            raise IntegrityError(f"{idx_path(prefix)}: has {found} {what}, {manifest_path(prefix)} says "
                                 f"{expected}: they are of different runs; run preprocess again")
