"""The worker's part of preprocessing: a chunk of the input becomes a file of token ids and an account.

    1. `EncodeSettings`             what a worker has to know, sent once
    2. `make_worker(settings)`      loads the tokenizer, returns the function that a worker answers with
    3. `work(numbered chunk)`       read, draw the split, encode, append the end of document, write the ids

Ids go to a file a split in the run's folder, so that the parent never holds them; the answer tells the rest.
Letters: D documents, T tokens.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.chunks import Chunk
from megatron_encdec.text.documents import Batch, LongDocument, read_chunk
from megatron_encdec.text.encoder import LONG_CHARACTERS, Encoder, encode_long
from megatron_encdec.text.indexed import token_dtype
from megatron_encdec.text.losses import LossCounter, Losses
from megatron_encdec.text.tokenizer import Tokenizer, load_tokenizer

TRAIN, VALIDATION = "train", "validation"
EXAMPLES_KEPT = 3  # of documents skipped for one reason


@dataclass(frozen=True)
class EncodeSettings:
    """The tokenizer (as for `load_tokenizer`), the encoder's name, the JSON key of the text, the validation split
    in per cent, and the folder to write ids into."""

    tokenizer_path: str
    mask_token: str | None
    eod_token: str | None
    encoder: str
    text_key: str
    validation_percent: float
    folder: str


@dataclass
class Account(Losses):
    """What became of a chunk's documents in one split: how many, what they took, the sha256 of their ids; and what
    the tokenizer lost of them."""

    documents: int = 0
    tokens: int = 0
    bytes_in: int = 0
    characters: int = 0
    sha256: str = ""


@dataclass
class ChunkAccount:
    """A worker's answer. `splits`: account by split; `skipped`: reason -> (count, bytes, first (file, line)s);
    `lines` of the chunk; `unproven`: cuts inside long documents that the tokenizer does not make by itself;
    `lengths`: tokens of each document, by split (left out of the journal)."""

    number: int
    consumed: int
    lines: int = 0
    unproven: int = 0
    splits: dict[str, Account] = field(default_factory=dict)
    skipped: dict[str, tuple[int, int, list[tuple[int, int]]]] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)

    def record(self) -> dict:
        """The account as plain data, for the journal."""
        return {key: value for key, value in asdict(self).items() if key != "lengths"}


def is_validation(text_hash: bytes, validation_percent: float) -> bool:
    """Whether a document is set aside: a function of its text's sha256 alone, so new data moves no old document."""
    return 100 * int.from_bytes(text_hash[:8], "big") / 2**64 < validation_percent


def ids_path(folder: str | Path, number: int, split: str) -> Path:
    """Where the ids of chunk `number` wait for the parent."""
    return Path(folder) / f"ids-{number:06d}.{split}"


def make_worker(settings: EncodeSettings) -> Callable[[tuple[int, Chunk]], ChunkAccount]:
    """Load the tokenizer here, and return the function from a numbered chunk to its account."""
    tokenizer = load_tokenizer(settings.tokenizer_path, settings.mask_token, settings.eod_token)
    encoder = Encoder(tokenizer, settings.encoder)
    dtype, losses = token_dtype(tokenizer.vocabulary_size), LossCounter(tokenizer)

    def work(item: tuple[int, Chunk]) -> ChunkAccount:
        number, chunk = item
        try:
            writing = _ChunkWriting(number, chunk, settings, encoder, dtype, tokenizer, losses)
            for part in read_chunk(chunk, settings.text_key):
                if isinstance(part, LongDocument):
                    writing.add_long(part)
                else:
                    writing.add_batch(part)
            return writing.finish()
        except OSError as error:  # writing, or a text file that is gone
            raise UserError(f"{error.filename or settings.folder}: {error.strerror or error}") from None

    return work


class _ChunkWriting:
    """A chunk's ids and account while they grow."""

    def __init__(self, number: int, chunk: Chunk, settings: EncodeSettings, encoder: Encoder, dtype: np.dtype,
                 tokenizer: Tokenizer, losses: LossCounter):
        self._settings, self._encoder, self._dtype, self._losses = settings, encoder, dtype, losses
        self._eod_id, self._may_fail = tokenizer.eod_id, tokenizer.model.may_fail
        self._chunk = chunk
        self.account = ChunkAccount(number, chunk.consumed)
        self._splits = (TRAIN, VALIDATION) if settings.validation_percent else (TRAIN,)
        self._lengths = {split: [] for split in self._splits}
        self._hashes = {split: hashlib.sha256() for split in self._splits}
        self._files = {}
        for split in self._splits:
            self.account.splits[split] = Account()
            self._files[split] = open(ids_path(settings.folder, number, split), "wb")  # noqa: SIM115

    def add_batch(self, batch: Batch) -> None:
        """Ordinary documents, encoded all at once; a long one among them by itself, in its place."""
        long = [place for place, count in enumerate(batch.characters_D) if count > LONG_CHARACTERS]
        start = 0
        for place in [*long, len(batch.texts_D)]:
            if place > start:
                self._add_ordinary(batch, slice(start, place))
            if place < len(batch.texts_D):
                text, (file, line) = batch.texts_D[place].decode("utf-8"), batch.places_D[place]
                self.add_long(LongDocument(file, line, batch.sizes_D[place], lambda text=text: iter([text])))
            start = place + 1
        for reason, file, line, size in batch.skipped:
            self._skip(reason, file, line, size)

    def _add_ordinary(self, batch: Batch, which: slice) -> None:
        texts_D, sizes_D = batch.texts_D[which], np.array(batch.sizes_D[which])
        characters_D, places_D = np.array(batch.characters_D[which]), batch.places_D[which]
        ids_T, lengths_D = self._encoder.encode(texts_D)
        kept_D = lengths_D > 0
        for place in np.flatnonzero(~kept_D).tolist():
            self._skip("no_tokens", *places_D[place], int(sizes_D[place]))
        chosen_D = np.zeros(len(texts_D), bool)
        if self._settings.validation_percent:
            percent = self._settings.validation_percent
            chosen_D[:] = [is_validation(hashlib.sha256(text).digest(), percent) for text in texts_D]
        self.account.lines += int(kept_D.sum())
        for split in self._splits:
            mine_D = kept_D & (chosen_D == (split == VALIDATION))
            all_mine = bool(mine_D.all())
            split_T = ids_T if all_mine else ids_T[np.repeat(mine_D, lengths_D)]
            self._write(split, split_T, lengths_D[mine_D])
            account = self.account.splits[split]
            self._losses.add(account, compress(texts_D, mine_D), split_T)
            account.bytes_in += int(sizes_D[mine_D].sum())
            account.characters += int(characters_D[mine_D].sum())

    def _write(self, split: str, ids_T: np.ndarray, lengths_D: np.ndarray) -> None:
        """The ids with an end of document behind each document."""
        ends_D = np.cumsum(lengths_D + 1)
        row_T = np.empty(len(ids_T) + len(lengths_D), self._dtype)
        inside_T = np.ones(len(row_T), bool)
        inside_T[ends_D - 1] = False
        row_T[inside_T] = ids_T
        row_T[ends_D - 1] = self._eod_id
        self._put(split, row_T)
        self._end_documents(split, lengths_D + 1)

    def _put(self, split: str, row_T: np.ndarray) -> None:
        data = memoryview(row_T).cast("B")
        self._files[split].write(data)
        self._hashes[split].update(data)
        self.account.splits[split].tokens += len(row_T)

    def _end_documents(self, split: str, lengths_D: np.ndarray) -> None:
        self._lengths[split].append(lengths_D)
        self.account.splits[split].documents += len(lengths_D)

    def add_long(self, document: LongDocument) -> None:
        """A long document: hashed for its split, then encoded and written piece by piece."""
        split, characters = TRAIN, 0
        digest = hashlib.sha256()
        for piece in document.pieces():
            characters += len(piece)
            digest.update(piece.encode("utf-8"))
            if self._may_fail and piece.strip() and not len(self._encoder.encode([piece.encode()])[0]):
                self._skip("no_tokens", document.file, document.line, document.size)  # before any of it is written
                return
        if self._settings.validation_percent and is_validation(digest.digest(), self._settings.validation_percent):
            split = VALIDATION
        length = 0
        for ids_T, proven in encode_long(document.pieces(), lambda text: self._encoder.encode([text.encode()])[0]):
            self._put(split, ids_T.astype(self._dtype))
            self._losses.add(self.account.splits[split], (), ids_T)
            length += len(ids_T)
            self.account.unproven += not proven
        if not length:
            self._skip("no_tokens", document.file, document.line, document.size)
            return
        self.account.lines += 1
        self._losses.add(self.account.splits[split], map(str.encode, document.pieces()), np.empty(0, np.uint32))
        self._put(split, np.array([self._eod_id], self._dtype))
        self._end_documents(split, np.array([length + 1]))
        self.account.splits[split].bytes_in += document.size
        self.account.splits[split].characters += characters

    def _skip(self, reason: str, file: int, line: int, size: int) -> None:
        count, taken, first = self.account.skipped.get(reason, (0, 0, []))
        first = sorted([*first, (file, line)])[:EXAMPLES_KEPT]
        self.account.skipped[reason] = (count + 1, taken + size, first)

    def finish(self) -> ChunkAccount:
        """Close the files; the chunk's input, if it was spooled, is not needed any more once the parent has it."""
        account = self.account
        account.lines += sum(count for count, _, _ in account.skipped.values())
        for split, file in self._files.items():
            file.close()
            account.splits[split].sha256 = self._hashes[split].hexdigest()
            lengths = self._lengths[split]
            lengths_D = np.concatenate(lengths) if lengths else np.empty(0, np.int64)
            if len(lengths_D) and lengths_D.max() > np.iinfo(np.int32).max:
                raise UserError(f"{self._chunk.names[0]}: holds a document of more than 2^31 tokens, which the index "
                                "format cannot tell; cut it")
            account.lengths[split] = lengths_D.astype("<i4")
        return account


def remove_parts(folder: Path, number: int) -> None:
    """Take away what a chunk left in the folder."""
    for split in (TRAIN, VALIDATION):
        ids_path(folder, number, split).unlink(missing_ok=True)
    (folder / f"block-{number:06d}").unlink(missing_ok=True)


