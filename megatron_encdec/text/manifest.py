"""`PREFIX.manifest.json`: what went into the data, what came out, and how to recognise it.

    1. `describe(...)`          what a writer wrote -> `Manifest`; `write` and `read` it
    2. `check_files(prefix)`    do `.bin`, `.idx` and manifest belong together? In milliseconds at any size

A shard is a piece of `.bin` of a fixed size, with a hash of its own. The data's fingerprint is the hash of the list of
these hashes, with the index's hash at the end: merged or copied shards keep their hashes, and any changed byte changes
the fingerprint. The manifest depends on nothing but inputs, settings and installed encoder (no times, no worker count):
equal runs write equal ones.
"""

import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.platform.schema import build, to_dict
from megatron_encdec.rundir.files import refuse_pointer, write_json_atomic
from megatron_encdec.text.indexed import SHARD_SIZE, IndexedFiles, bin_path, check_size, idx_path, read_header

TRAIN, VALIDATION = "train", "validation"
# What a tokenizer may not be able to keep of a text: counted, so that nothing is missing without a number.
LOSSES = {"special_tokens_in_text": "special tokens spelt out in the text, which this tokenizer cannot keep as text",
          "unknown_tokens": "unknown tokens stand for text that this tokenizer does not know",
          "dropped_characters": "characters that this tokenizer does not know are left out (it has no unknown token)"}
SUMMED = ("bytes_in", "characters", *LOSSES)  # over chunks, and over merged outputs
EXAMPLES_KEPT = 3  # of documents skipped for one reason


@dataclass(frozen=True)
class Skipped:
    """Documents left out for one reason: how many, and "file:line" of the first few."""

    count: int
    examples: tuple[str, ...]

    def __add__(self, more: "Skipped") -> "Skipped":
        return Skipped(self.count + more.count, (*self.examples, *more.examples)[:EXAMPLES_KEPT])


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer the ids belong to."""

    fingerprint: str  # `Tokenizer.fingerprint`; in data of earlier versions that of the file's bytes
    vocabulary_size: int
    eod_id: int
    mask_id: int | None


@dataclass(frozen=True)
class InputFile:
    """An input as it was when listed. A hub dataset has its whole `hf:` name as path, and size and time 0; what is read
    by a URL a `version`, as far as its store tells one, in place of a time."""

    path: str  # as the user gave it
    size: int  # in bytes
    mtime_ns: int
    version: str = ""

    def to_yaml(self) -> dict:
        """Without a version where there is none."""
        plain = {"path": self.path, "size": self.size, "mtime_ns": self.mtime_ns}
        return plain | ({"version": self.version} if self.version else {})


@dataclass(frozen=True)
class EncoderRecord:
    """The library that encoded the text, and on how much of it, at the start, it was compared with the tokenizer."""

    name: str
    version: str
    compared_documents: int
    compared_characters: int


@dataclass(frozen=True)
class Settings:
    """What else decided the content. `share` "i/n" says which part of the inputs this is, "1/1" all of them."""

    text_key: str
    validation_percent: float
    split: str  # `train`, or `validation` for the documents drawn aside
    share: str = field(default="1/1", metadata={"key": "shard"})


@dataclass(frozen=True)
class Manifest:
    """The record beside a `.bin/.idx` pair. `tokenizer` and `settings` are None where another tool wrote the pair
    (`data/fingerprint.py`), never in a PREFIX.manifest.json. Data of earlier versions lacks what has a default."""

    documents: int
    tokens: int  # with one end of document each
    bytes_in: int  # of decompressed input; what the skipped documents took counts with the train split
    characters: int
    skipped: dict[str, Skipped]
    dtype: str
    tokenizer: TokenizerRecord | None
    settings: Settings | None
    bin_bytes: int
    idx_bytes: int
    shard_bytes: int  # of `.bin` under one hash
    shards: tuple[str, ...]
    idx_sha256: str
    fingerprint: str
    inputs: tuple[InputFile, ...]
    parts: tuple[int, ...] = ()  # bytes of `.bin` from each merged output, whose shards begin anew and may end short
    encoder: EncoderRecord | None = None
    unproven_cuts: int = 0  # places where very long documents were cut for the tokenizer without proof of no difference
    special_tokens_in_text: int = 0  # this and the next two: `LOSSES`
    unknown_tokens: int = 0
    dropped_characters: int = 0

    def losses(self) -> dict[str, int]:
        """`LOSSES`, counted."""
        return {loss: getattr(self, loss) for loss in LOSSES}


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def split_prefixes(prefix: str | Path, validation_percent: float) -> dict[str, Path]:
    """Where each split goes: PREFIX, and PREFIX.validation where documents are set aside."""
    found = {TRAIN: Path(prefix)}
    return found | {VALIDATION: Path(f"{prefix}.{VALIDATION}")} if validation_percent else found


def writing_command(prefix: str | Path, is_split: bool = False, tokenizer: str = "TOKENIZER") -> str:
    """The command that writes the files of `prefix`, for whoever lacks them; in capitals what only they can know.
    is_split: its validation split is wanted too; that of a PREFIX.validation is written along with PREFIX."""
    whole = str(prefix).removesuffix(f".{VALIDATION}")
    words = ["megatron-encdec", "preprocess", "--input", "TEXTS", "--tokenizer", tokenizer, "--output", whole]
    return shlex.join(words + ["--validation-percent", "PERCENT"] * (is_split or whole != str(prefix)))


def data_fingerprint(shards: tuple[str, ...], idx_sha256: str) -> str:
    """Hex sha256 over the hashes of the shards and of the index, one a line."""
    return hashlib.sha256("\n".join([*shards, idx_sha256]).encode()).hexdigest()


def describe(files: IndexedFiles, **facts) -> Manifest:
    """The manifest of finished `files`; `facts` are the fields that the files themselves do not tell."""
    return Manifest(**vars(files), shard_bytes=SHARD_SIZE, fingerprint=data_fingerprint(files.shards, files.idx_sha256),
                    **facts)


def write(path: Path, manifest: Manifest) -> None:
    write_json_atomic(path, to_dict(manifest))


def read(prefix: str | Path) -> Manifest:
    """Read `PREFIX.manifest.json`; a `UserError` names the file if it is missing or malformed."""
    manifest = read_file(path := manifest_path(prefix))
    if not (manifest.tokenizer and manifest.settings):
        raise UserError(f"{path}: not a manifest of preprocess (no tokenizer, no settings); run preprocess again")
    return manifest


def read_file(path: Path) -> Manifest:
    """Read the manifest at `path`, whoever wrote the data."""
    refuse_pointer(path)
    try:
        manifest = build(Manifest, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest; preprocess writes it last") from None
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path}: not a manifest of preprocess ({error}); run preprocess again") from None
    if manifest.fingerprint != data_fingerprint(manifest.shards, manifest.idx_sha256):
        raise IntegrityError(f"{path}: its fingerprint is not the hash of its shards' list; preprocess again")
    return manifest


def check_files(prefix: str | Path) -> Manifest | None:
    """Check sizes, header and counts of `.bin` and `.idx` against each other and the manifest. Returns the manifest,
    None where there is none (data of another tool). Reads a few bytes: altered content of the right size is not seen.
    Raises `IntegrityError` naming the file that is missing, truncated or appended to, with expected and found bytes."""
    manifest = read(prefix) if manifest_path(prefix).exists() else None
    check_sizes(prefix, manifest)
    header = read_header(prefix)
    if manifest is None:
        check_size(bin_path(prefix), header.bin_bytes)
    else:
        if header.bin_bytes != manifest.bin_bytes:
            raise IntegrityError(f"{idx_path(prefix)}: altered: its last document ends at byte {header.bin_bytes:,} of "
                                 f"{manifest.bin_bytes:,}; copy it again, or run preprocess again")
        tokens = header.bin_bytes // header.dtype.itemsize
        for what, expected, found in (("documents", manifest.documents, header.documents),
                                      ("sequences", manifest.documents, header.sequences),
                                      ("tokens", manifest.tokens, tokens),
                                      ("dtype", manifest.dtype, header.dtype.name)):
            if expected != found:
                raise IntegrityError(f"{idx_path(prefix)}: has {found} {what}, {manifest_path(prefix)} says "
                                     f"{expected}: they are of different runs; run preprocess again")
    return manifest


def check_sizes(prefix: str | Path, manifest: Manifest | None, hint: str = "") -> None:
    """Raises `IntegrityError` where `.bin` or `.idx` is missing, or has not the size that `manifest` says."""
    for path, size in ((bin_path(prefix), manifest and manifest.bin_bytes),
                       (idx_path(prefix), manifest and manifest.idx_bytes)):
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; copy it again, or write it with {writing_command(prefix)}")
        refuse_pointer(path)
        if manifest:
            check_size(path, size, hint)
