"""The worker's part of preprocessing: bytes of documents in, token ids out.

    1. `EncodeSettings`             what a worker has to know, sent once
    2. `make_encoder(settings)`     loads the tokenizer, returns the function that a worker answers with
    3. `encode(batch)`              decode and parse, draw the split, tokenize, append the end of document
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_encdec.text.corpus import RawDocument, parse
from megatron_encdec.text.indexed import token_dtype
from megatron_encdec.text.tokenizer import load_tokenizer

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class EncodeSettings:
    """The tokenizer (as for `load_tokenizer`), the JSON key of the text, the validation split in per cent."""

    tokenizer_path: str
    mask_token: str | None
    eod_token: str | None
    text_key: str
    validation_percent: float


@dataclass
class EncodedPart:
    """The documents of a batch of one split: ids in one row, tokens per document, what they took."""

    tokens_T: np.ndarray
    lengths_N: np.ndarray
    bytes_in: int
    characters: int


@dataclass
class EncodedBatch:
    """A batch's documents by split; the skipped ones as (reason, "file:line", bytes); bytes taken on disk."""

    parts: dict[str, EncodedPart]
    skipped: list[tuple[str, str, int]] = field(default_factory=list)
    consumed: int = 0


def split_of(text: str, validation_percent: float) -> str:
    """The split a document belongs to: a function of its text alone, so new data moves no old document."""
    if validation_percent == 0:
        return TRAIN
    draw = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64
    return VALIDATION if 100 * draw < validation_percent else TRAIN


def make_encoder(settings: EncodeSettings) -> Callable[[list[RawDocument]], EncodedBatch]:
    """Load the tokenizer here, and return the function from a batch of raw documents to their tokens."""
    tokenizer = load_tokenizer(settings.tokenizer_path, settings.mask_token, settings.eod_token)
    dtype = token_dtype(tokenizer.vocabulary_size)
    splits = (TRAIN, VALIDATION) if settings.validation_percent else (TRAIN,)

    def encode(batch: list[RawDocument]) -> EncodedBatch:
        result = EncodedBatch({}, consumed=sum(raw.consumed for raw in batch))
        chosen: dict[str, list] = {split: [] for split in splits}
        documents = [parse(raw, settings.text_key) for raw in batch]
        texts = [document.text for document in documents if document.text is not None]
        ids = iter(tokenizer.encode_batch(texts))
        for document in documents:
            document_ids = next(ids) if document.text is not None else []
            if document_ids:
                chosen[split_of(document.text, settings.validation_percent)].append((document, document_ids))
            else:  # also a text of which the tokenizer's normalizer leaves nothing
                where = f"{document.file}:{document.line}"
                result.skipped.append((document.reason or "empty", where, document.size))
        for split, members in chosen.items():
            result.parts[split] = _part(members, tokenizer.eod_id, dtype)
        return result

    return encode


def _part(members: list, eod_id: int, dtype: np.dtype) -> EncodedPart:
    lengths_N = np.array([len(ids) + 1 for _, ids in members], dtype=np.int32)
    tokens_T = np.empty(int(lengths_N.sum()), dtype)
    start = 0
    for _, ids in members:
        tokens_T[start : start + len(ids)] = ids
        tokens_T[start + len(ids)] = eod_id
        start += len(ids) + 1
    return EncodedPart(tokens_T, lengths_N, sum(document.size for document, _ in members),
                       sum(len(document.text) for document, _ in members))
