"""The worker's part of preprocessing: a chunk of the input becomes a file of token ids and an account.

    1. `Worker(...)`               loads the tokenizer
    2. `worker(numbered chunk)`    read, draw the split, encode, append the end of document, write the ids, count losses

Ids go to a file a split in the run's folder, so that the parent never holds them; the answer tells the rest.
Letters: D documents, T tokens.
"""

import hashlib
import re
from collections.abc import Iterable
from itertools import compress
from pathlib import Path

import numpy as np

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.chunks import Account, Chunk, ChunkAccount
from megatron_encdec.text.documents import Batch, LongDocument, Place, read_chunk
from megatron_encdec.text.encoder import LONG_CHARACTERS, Encoder, encode_long
from megatron_encdec.text.fields import Selection
from megatron_encdec.text.indexed import token_dtype
from megatron_encdec.text.manifest import EXAMPLES_KEPT, TRAIN, VALIDATION
from megatron_encdec.text.tokenizer import Tokenizer, load_tokenizer

NONE = np.empty(0, np.int64)


def is_validation(text_hash: bytes, validation_percent: float) -> bool:
    """Whether a document is set aside: a function of its text's sha256 alone, so new data moves no old document."""
    return 100 * int.from_bytes(text_hash[:8], "big") / 2**64 < validation_percent


def ids_path(folder: str | Path, number: int, split: str) -> Path:
    """Where the ids of chunk `number` wait for the parent."""
    return Path(folder) / f"ids-{number:06d}.{split}"


def remove_parts(folder: Path, number: int) -> None:
    """Take away what chunk `number` left in the folder."""
    for split in (TRAIN, VALIDATION):
        ids_path(folder, number, split).unlink(missing_ok=True)
    for path in folder.glob(f"block-{number:06d}*"):
        path.unlink()


class Worker:
    """The function from a numbered chunk to its account, with the tokenizer of `load_tokenizer` and the library
    `encoder`; ids go into `folder`."""

    def __init__(self, tokenizer_path: str, mask_token: str | None, eod_token: str | None, encoder: str,
                 text_key: Selection, validation_percent: float, folder: str):
        self.text_key, self.validation_percent, self.folder = text_key, validation_percent, folder
        self.tokenizer = load_tokenizer(tokenizer_path, mask_token, eod_token)
        self.encoder = Encoder(self.tokenizer, encoder)
        self.dtype, self.losses = token_dtype(self.tokenizer.vocabulary_size), LossCounter(self.tokenizer)

    def __call__(self, item: tuple[int, Chunk]) -> ChunkAccount:
        number, chunk = item
        try:
            writing = _ChunkWriting(self, number, chunk)
            for part in read_chunk(chunk, self.text_key):
                if isinstance(part, LongDocument):
                    writing.add_long(part)
                else:
                    writing.add_batch(part)
            return writing.finish()
        except OSError as error:  # writing, or a text file that is gone
            raise UserError(f"{error.filename or self.folder}: {error.strerror or error}") from None


class LossCounter:
    """Counts what `tokenizer` cannot keep of texts (`manifest.LOSSES`): nothing, at no cost, if it is byte-level."""

    def __init__(self, tokenizer: Tokenizer):
        self._unknown_id = tokenizer.unknown_id
        self._dropped = tokenizer.model.dropped if tokenizer.model.drops else None
        names = [tokenizer.token(id_) for id_ in tokenizer.special_ids if id_ != tokenizer.unknown_id]
        lost = [name for name, ids in zip(names, tokenizer.encode_batch(names), strict=True)
                if not ids or tokenizer.unknown_id in ids or (self._dropped and self._dropped(name))]
        lost.sort(key=len, reverse=True)
        self._spelt = re.compile(b"|".join(re.escape(name.encode()) for name in lost)) if lost else None

    def add(self, account: Account, texts: Iterable[bytes], ids_T: np.ndarray) -> None:
        """Add to `account` what is lost of `texts` (UTF-8), whose ids are `ids_T`."""
        if self._unknown_id is not None:
            account.unknown_tokens += int(np.count_nonzero(ids_T == self._unknown_id))
        if self._spelt is None and self._dropped is None:
            return
        for text in texts:
            if self._spelt is not None:
                account.special_tokens_in_text += len(self._spelt.findall(text))
            if self._dropped is not None:
                account.dropped_characters += self._dropped(text.decode("utf-8"))


class _ChunkWriting:
    """A chunk's ids and account while they grow."""

    def __init__(self, worker: Worker, number: int, chunk: Chunk):
        self._worker, self._chunk, self._percent = worker, chunk, worker.validation_percent
        splits = (TRAIN, VALIDATION) if self._percent else (TRAIN,)
        self._account = ChunkAccount(number, chunk.consumed, splits={split: Account() for split in splits})
        self._lengths, self._hashes = {split: [NONE] for split in splits}, {split: hashlib.sha256() for split in splits}
        self._files = {split: open(ids_path(worker.folder, number, split), "wb") for split in splits}  # noqa: SIM115

    def add_batch(self, batch: Batch) -> None:
        """Ordinary documents, encoded all at once; a long one among them by itself, in its place."""
        long = [number for number, count in enumerate(batch.characters_D) if count > LONG_CHARACTERS]
        start = 0
        for number in [*long, len(batch.texts_D)]:
            if number > start:
                self._add_ordinary(batch, slice(start, number))
            if number < len(batch.texts_D):
                text = batch.texts_D[number].decode("utf-8")
                self.add_long(LongDocument(batch.places_D[number], lambda text=text: iter([text])))
            start = number + 1
        for reason, place in batch.skipped:
            self._skip(reason, place)

    def _add_ordinary(self, batch: Batch, which: slice) -> None:
        texts_D, places_D = batch.texts_D[which], batch.places_D[which]
        characters_D, sizes_D = np.array(batch.characters_D[which]), np.array([place.size for place in places_D])
        ids_T, lengths_D = self._worker.encoder.encode(texts_D)
        kept_D = lengths_D > 0
        for place in compress(places_D, ~kept_D):
            self._skip("no_tokens", place)
        chosen_D = np.zeros(len(texts_D), bool)
        if self._percent:
            chosen_D[:] = [is_validation(hashlib.sha256(text).digest(), self._percent) for text in texts_D]
        self._account.lines += int(kept_D.sum())
        for split, account in self._account.splits.items():
            mine_D = kept_D & (chosen_D == (split == VALIDATION))
            split_T = ids_T if mine_D.all() else ids_T[np.repeat(mine_D, lengths_D)]
            ends_D = np.cumsum(lengths_D[mine_D])
            row_T = np.insert(split_T.astype(self._worker.dtype), ends_D, self._worker.tokenizer.eod_id)
            self._put(split, row_T, lengths_D[mine_D] + 1)
            self._worker.losses.add(account, compress(texts_D, mine_D), split_T)
            account.bytes_in += int(sizes_D[mine_D].sum())
            account.characters += int(characters_D[mine_D].sum())

    def _put(self, split: str, row_T: np.ndarray, lengths_D: np.ndarray = NONE) -> None:
        """Write ids with which documents of these lengths end."""
        data, account = memoryview(row_T).cast("B"), self._account.splits[split]
        self._files[split].write(data)
        self._hashes[split].update(data)
        self._lengths[split].append(lengths_D)
        account.tokens += len(row_T)
        account.documents += len(lengths_D)

    def add_long(self, document: LongDocument) -> None:
        """Hashed for its split, then encoded and written piece by piece."""
        worker, digest, characters = self._worker, hashlib.sha256(), 0

        def encode(text: str) -> np.ndarray:
            return worker.encoder.encode([text.encode()])[0]

        for piece in document.pieces():
            characters += len(piece)
            digest.update(piece.encode("utf-8"))
            if worker.tokenizer.model.may_fail and piece.strip() and not len(encode(piece)):
                return self._skip("no_tokens", document.place)  # before any of it is written
        split = VALIDATION if is_validation(digest.digest(), self._percent) else TRAIN
        account, length = self._account.splits[split], 0
        for ids_T, proven in encode_long(document.pieces(), encode):
            self._put(split, ids_T.astype(worker.dtype))
            worker.losses.add(account, (), ids_T)
            length += len(ids_T)
            self._account.unproven += not proven
        if not length:
            return self._skip("no_tokens", document.place)
        self._account.lines += 1
        worker.losses.add(account, map(str.encode, document.pieces()), NONE)
        self._put(split, np.array([worker.tokenizer.eod_id], worker.dtype), np.array([length + 1]))
        account.bytes_in += document.place.size
        account.characters += characters

    def _skip(self, reason: str, place: Place) -> None:
        count, taken, first = self._account.skipped.get(reason, (0, 0, []))
        first = sorted([*first, (place.file, place.line)])[:EXAMPLES_KEPT]
        self._account.skipped[reason] = (count + 1, taken + place.size, first)

    def finish(self) -> ChunkAccount:
        """Close the files; the chunk's input, if it was spooled, is not needed any more once the parent has it."""
        account = self._account
        account.lines += sum(count for count, _, _ in account.skipped.values())
        for split, file in self._files.items():
            file.close()
            account.splits[split].sha256 = self._hashes[split].hexdigest()
            lengths_D = np.concatenate(self._lengths[split])
            if len(lengths_D) and lengths_D.max() > np.iinfo(np.int32).max:
                raise UserError(f"{self._chunk.names[0]}: holds a document of more than 2^31 tokens, which the index "
                                "format cannot tell; cut it")
            account.lengths[split] = lengths_D.astype("<i4")
        return account
