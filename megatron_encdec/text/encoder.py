"""Text to token ids at speed: `gigatoken` where it is proven equal to the tokenizer, else the tokenizer itself.

    1. `choose_encoder(tokenizer, sample)`   compares both on a sample of the user's own text, at every start
    2. `Encoder(tokenizer, name)`            in each worker: the one that was chosen; ids of many documents in a row
    3. `encode_long(pieces, encode)`         one long document piece by piece, with the ids of the whole

gigatoken gives the ids of a tokenizer.json or a SentencePiece BPE model many times faster, but is another program:
besides the sample at the start, one document in each 16 MB is compared while working, and a difference ends the
run. Its cache of words grows without bound, so a worker starts it anew when its memory has grown by `CACHE_BYTES`.
Letters: D documents, T tokens.
"""

from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
import psutil

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.manifest import EncoderRecord
from megatron_encdec.text.tokenizer import Tokenizer

GIGATOKEN, TOKENIZERS = "gigatoken", "tokenizers"
CACHE_BYTES = 256 << 20  # growth of a worker's memory that gigatoken's cache is allowed
COMPARED_BYTES = 8192  # of text at most, once in ...
COMPARE_EVERY = 16 << 20  # ... so many bytes: about one part in a hundred of the time
BATCH_BYTES = 1 << 20  # given to the tokenizer at once: it keeps some 100 bytes a token meanwhile
LONG_CHARACTERS = 1 << 20  # a document longer than this is encoded in pieces of at most this length
WINDOW = 512  # characters on each side of a cut that are encoded with and without it
CANDIDATES = 64  # places tried, nearest first
MOST_PROBES = 1000  # of the tokens that were added to a vocabulary

# What a sample may not contain and tokenizers differ in: kinds of blanks, numbers, scripts, contractions, controls.
PROBES = (" ", "  two   three\n\n\n four\t\tfive \r\n", "It's they'LL I'd we've CAN'T", "0 12 345 6789 1234567890 3.14",
          "naïve façade — “quotes” … café", "東京と大阪、안녕하세요 привет мир", "👩‍👩‍👧 🇫🇷 é é \u200b\u00a0",
          "ﬁ ² \u00a0\u0301 Å 가 ǅ ẞ İ क्षि \u0301x \u3000\u2028 ▁a ▁▁ \ufeff", "A'b _c __d e_f /g -h (i) #j\n.k",
          "a\x00b\x01c\x7f", "x" * 300, "def f(x):\n    return {**x, 'a': [1, 2]}  # ok\n", "https://a.b/c?d=e&f=%20")


class Encoder:
    """Encodes documents with the library `name`."""

    def __init__(self, tokenizer: Tokenizer, name: str):
        self._tokenizer, self._process = tokenizer, psutil.Process()
        self._fast, self._full, self._uncompared = None, 0, COMPARE_EVERY
        if name == GIGATOKEN:
            self._start()

    def _start(self) -> None:
        self._fast = None  # frees the old one's cache first
        self._fast = self._tokenizer.model.for_gigatoken()
        self._full = self._process.memory_info().rss + CACHE_BYTES

    def encode(self, texts_D: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(ids_T, lengths_D) of documents given as UTF-8: nothing before or after the ids of each."""
        if self._fast is None:
            ids_D = self._slow(texts_D)
        else:
            if self._process.memory_info().rss > self._full:
                self._start()
            ids_D = list(map(self._fast.encode, texts_D))
            self._compare(texts_D, ids_D)
        lengths_D = np.fromiter(map(len, ids_D), np.int64, len(ids_D))
        return (np.concatenate(ids_D) if ids_D else np.empty(0, np.uint32)), lengths_D

    def _slow(self, texts_D: list[bytes]) -> list[np.ndarray]:
        ids_D, batch, size = [], [], 0
        for place, text in enumerate(texts_D, start=1):
            batch.append(text.decode("utf-8"))
            size += len(text)
            if size >= BATCH_BYTES or place == len(texts_D):
                ids_D += [np.array(ids, np.uint32) for ids in self._tokenizer.encode_batch(batch)]
                batch, size = [], 0
        return ids_D

    def _compare(self, texts_D: list[bytes], ids_D: list[np.ndarray]) -> None:
        """Now and then one document, of ordinary size, by both; which one follows from what the call holds."""
        self._uncompared += sum(map(len, texts_D))
        if self._uncompared < COMPARE_EVERY:
            return
        self._uncompared = 0
        ordinary = [place for place, text in enumerate(texts_D[:997]) if len(text) <= COMPARED_BYTES]
        if ordinary:
            place = ordinary[len(texts_D) * 31 % len(ordinary)]
            text = texts_D[place].decode("utf-8")
            if self._tokenizer.encode(text) != ids_D[place].tolist():
                raise UserError(f"gigatoken and the tokenizer disagree on a document that starts {text[:60]!r}; run "
                                f"again with --encoder {TOKENIZERS}")


def choose_encoder(tokenizer: Tokenizer, sample: list[str], wanted: str | None = None) -> tuple[EncoderRecord, str]:
    """gigatoken if it gives the tokenizer's ids on every text of `sample` and on texts of ours, else `tokenizers`; and
    why that one. `wanted` names one of the two; a `UserError` says why gigatoken cannot be used where it is wanted."""
    ours = EncoderRecord(TOKENIZERS, version("tokenizers"), 0, 0)
    if wanted == TOKENIZERS:
        return ours, "asked for"
    texts = [*sample, *PROBES, *_token_probes(tokenizer)]
    try:
        fast = tokenizer.model.for_gigatoken()
        different = next((text for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
                          if fast.encode(text.encode("utf-8")).tolist() != ids), None)
        if different is None:
            record = EncoderRecord(GIGATOKEN, version("gigatoken"), len(texts), sum(map(len, texts)))
            return record, (f"same ids as the tokenizer on a sample of {record.compared_documents:,} texts, "
                            f"{record.compared_characters:,} characters")
        reason = f"its ids differ from the tokenizer's, first at {different[:60]!r}"
    except ImportError:
        reason = "gigatoken is not installed (pip install gigatoken)"
    except BaseException as error:  # noqa: BLE001  (an error or panic inside it: this tokenizer is not for it)
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = f"gigatoken cannot load this tokenizer ({' '.join(str(error).split())[:120]})"
    if wanted == GIGATOKEN:
        raise UserError(f"--encoder {GIGATOKEN}: {reason}; use --encoder {TOKENIZERS}")
    return ours, reason


def _token_probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts that hold the tokenizer's special tokens, and the others that were added to its vocabulary."""
    yield "".join(tokenizer.token(id_) or "" for id_ in tokenizer.special_ids)
    for name in tokenizer.model.ordinary_added()[:MOST_PROBES]:
        yield from (name, f"a{name}b", f"a {name} b  {name}\n{name}{name}", f" {name.upper()} {name.lower()} ")


def encode_long(pieces: Iterator[str], encode: Callable[[str], np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """The ids of one document, part by part, and of each part whether the cut after it is proven: the tokenizer cuts
    there by itself, so the text around it has the same ids when encoded in two. Where no place near the limit is (a
    megabyte without a blank, say), the text is cut all the same: a byte-level tokenizer still gives it back. The parts
    do not depend on how `pieces` come."""
    held, length, ended = [], 0, False
    while not ended:
        ended = (piece := next(pieces, None)) is None
        held.append(piece or "")
        length += len(held[-1])
        while length > LONG_CHARACTERS + WINDOW or (ended and length > LONG_CHARACTERS):
            text = "".join(held)
            place, resume = _place_to_cut(text, encode)
            yield encode(text[:place]), resume is not None
            held = [text[place if resume is None else resume:]]
            length = len(held[0])
    if length:
        yield encode("".join(held)), True


def _place_to_cut(text: str, encode: Callable[[str], np.ndarray]) -> tuple[int, int | None]:
    """(end of the first part, start of the rest): a SentencePiece model adds the blank before the rest itself, so there
    it is left out. The start is None where no place is proven: cut at the limit."""
    for place in _candidates(text):
        whole = encode(text[place - WINDOW : place + WINDOW]).tolist()
        first = encode(text[place - WINDOW : place]).tolist()
        if whole[: len(first)] == first:
            for start in (place, place + 1):
                if whole[len(first):] == encode(text[start : place + WINDOW]).tolist():
                    return place, start
    return LONG_CHARACTERS, None


def _candidates(text: str) -> Iterator[int]:
    """Places up to the limit, last first, where a blank ends a word; then line ends."""
    for mark in (" ", "\n"):
        place = LONG_CHARACTERS
        for _ in range(CANDIDATES // 2):
            place = text.rfind(mark, LONG_CHARACTERS // 2, place)
            if place < 0:
                break
            if text[place - 1].isalnum() and text[place + 1 : place + 2].isalnum():
                yield place
