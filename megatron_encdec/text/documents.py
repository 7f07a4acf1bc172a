"""A worker's view of a chunk: batches of ordinary documents, and long ones piece by piece.

    1. `read_chunk(chunk, key)`   yields `Batch`es and `LongDocument`s in document order
    2. `_files`, `_rows`          of a text file or a row all bytes are the text
    3. `_read_lines`              of a line of JSON the value of a key is

A document of `LONG` bytes or more is never decoded as a whole. Of a JSON line that long the bytes are kept, its
long strings are set apart, the rest is parsed with short stand-ins for them, and the text is decoded in pieces.
"""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import corpus
from megatron_encdec.text.chunks import Chunk
from megatron_encdec.text.corpus import BYTE_ORDER_MARK
from megatron_encdec.text.fields import Fields, Selection, parser
from megatron_encdec.text.parquet import iter_rows, iter_selected
from megatron_encdec.text.streams import reading

LONG = 4 << 20  # bytes from which a document is handled piece by piece
PIECE = 1 << 20  # bytes of a long document decoded at once
ROWS_IN_BATCH, BYTES_IN_BATCH = 4096, 16 << 20
# Before an escape (the second half of a surrogate pair apart), or before a character that no escape reaches.
_SAFE = re.compile(rb"(?<!\\)\\(?!u[dD][c-fC-F])|(?<=[^\\]{6})[^\\\x80-\xbf]")
Raw = Callable[[], Iterator[bytes]]  # a document's bytes in pieces, without a byte order mark


class Place(NamedTuple):
    """Where a document stands: file of the chunk, line; and the bytes of input that it takes."""

    file: int
    line: int
    size: int


@dataclass
class Batch:
    """Documents in order: D readable ones, and those `skipped` with their reason."""

    texts_D: list[bytes] = field(default_factory=list)  # UTF-8
    characters_D: list[int] = field(default_factory=list)
    places_D: list[Place] = field(default_factory=list)
    skipped: list[tuple[str, Place]] = field(default_factory=list)

    def add(self, parsed: tuple, place: Place) -> None:
        """Add what `parse_line` or `parse_text` said of a document."""
        text, data, reason = parsed
        if reason is None:
            self.texts_D.append(data)
            self.characters_D.append(len(text))
            self.places_D.append(place)
        else:
            self.skipped.append((reason, place))


class LongDocument(NamedTuple):
    """A readable document: `pieces()` iterates over its text, as often as asked."""

    place: Place
    pieces: Callable[[], Iterator[str]]


def read_chunk(chunk: Chunk, text_key: Selection) -> Iterator[Batch | LongDocument]:
    """The documents of `chunk`; lines count from 1 within the chunk. The last item is a `Batch`."""
    if chunk.kind == "lines":
        yield from _read_lines(chunk, text_key)
        return
    if chunk.kind == "rows" and isinstance(text_key, Fields):
        yield from _selected_rows(chunk, text_key)
        return
    batch, held = Batch(), 0
    for place, raw in _files(chunk) if chunk.kind == "texts" else _rows(chunk, text_key):
        if raw is None:
            batch.skipped.append(("not_text", place))
        elif place.size < LONG:
            batch.add(corpus.parse_text(b"".join(raw())), place)
            held += place.size
        else:
            yield batch
            batch, held = Batch(), 0
            yield from _long_text(raw, place, batch)
        if len(batch.texts_D) >= ROWS_IN_BATCH or held >= BYTES_IN_BATCH:
            yield batch
            batch, held = Batch(), 0
    yield batch


def _files(chunk: Chunk) -> Iterator[tuple[Place, Raw]]:
    def pieces(path: str) -> Iterator[bytes]:
        with reading(path), open(path, "rb") as file:
            yield file.read(PIECE).removeprefix(BYTE_ORDER_MARK)
            yield from iter(partial(file.read, PIECE), b"")

    for number, path in enumerate(chunk.paths):
        with reading(path):
            size = os.path.getsize(path)
        yield Place(number, 1, size), partial(pieces, path)


def _rows(chunk: Chunk, text_key: str) -> Iterator[tuple[Place, Raw | None]]:
    def pieces(data: bytes | memoryview) -> Iterator[bytes]:
        marked = bytes(data[: len(BYTE_ORDER_MARK)]) == BYTE_ORDER_MARK  # views are of signed bytes
        begin = len(BYTE_ORDER_MARK) if marked else 0
        return (bytes(data[start : start + PIECE]) for start in range(begin, len(data), PIECE))

    for row, data in enumerate(iter_rows(chunk.paths[0], text_key, range(chunk.start, chunk.end)), start=1):
        yield Place(0, row, len(data or b"")), None if data is None else partial(pieces, data)


def _selected_rows(chunk: Chunk, fields: Fields) -> Iterator[Batch]:
    batch, held = Batch(), 0
    for row, parsed in enumerate(iter_selected(chunk.paths[0], fields, range(chunk.start, chunk.end)), start=1):
        size = len(parsed[1] or b"")
        batch.add(parsed, Place(0, row, size))
        held += size
        if len(batch.texts_D) >= ROWS_IN_BATCH or held >= BYTES_IN_BATCH:
            yield batch
            batch, held = Batch(), 0
    yield batch


def _long_text(raw: Raw, place: Place, batch: Batch) -> Iterator[LongDocument]:
    """The document whose bytes are `raw()`, all of them text; if it is not readable, its reason goes to `batch`."""
    head = b"".join(islice(raw(), -(-corpus.UTF16_BYTES // PIECE)))[: corpus.UTF16_BYTES]
    reason = corpus.reason_of_zeros(chain([head], raw())) if b"\0" in head[:2] else None
    document = LongDocument(place, lambda: _decoded(raw()))
    reason = reason or _reason(document)
    yield from _checked(document, "utf16" if reason == "bad_utf8" and corpus.is_utf16(head) else reason, batch)


def _decoded(pieces: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def _reason(document: LongDocument) -> str | None:
    """Why the text is no document, None if it is one."""
    blank, halved = True, False
    try:
        for piece in document.pieces():
            blank = blank and (not piece or piece.isspace())
            halved = halved or corpus.encoded(piece, None)[2]  # and on: what is no JSON further on counts as that
    except UnicodeError:
        return "bad_utf8"
    except ValueError:
        return "bad_json"
    return halved or ("empty" if blank else None)


def _checked(document: LongDocument, reason: str | None, batch: Batch) -> Iterator[LongDocument]:
    if reason is None:
        yield document
    else:
        batch.skipped.append((reason, document.place))


def _read_lines(chunk: Chunk, text_key: Selection) -> Iterator[Batch | LongDocument]:
    try:
        with reading(chunk.names[0]), open(chunk.paths[0], "rb") as file:
            start = 0 if chunk.start == 0 else _next_line(file, chunk.start - 1, chunk.end)
            if start >= chunk.end and chunk.end:
                yield Batch()
                return
            end = _next_line(file, chunk.end - 1) if chunk.end else 0
            yield from _split(file, start, end, chunk.first and start == 0, text_key)
    except EOFError:
        raise UserError(f"{chunk.names[0]}: became shorter while it was read; run again") from None


def _next_line(file, position: int, enough: int | None = None) -> int:
    """Where the first line after byte `position` starts, or the file's end; after byte `enough`, some place there."""
    file.seek(position)
    while (enough is None or position < enough) and (piece := file.read(PIECE)):
        found = piece.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(piece)
    return position


def _split(file, position: int, end: int, marked: bool, text_key: Selection) -> Iterator[Batch | LongDocument]:
    """The lines in bytes [position, end) of `file`: a run of ordinary ones at once, long ones by themselves. `marked`:
    a byte order mark may stand there. Raises EOFError where the file has fewer bytes."""
    line = 1
    while position < end:
        file.seek(position)
        block = file.read(min(end - position, PIECE))
        if not block:
            raise EOFError
        complete = len(block) if position + len(block) == end else block.rfind(b"\n") + 1
        if not complete:  # a line longer than the block
            complete = min(_next_line(file, position), end) - position
            file.seek(position)
            block = file.read(complete)
        block, batch = block[:complete], Batch()
        if complete < LONG or block.find(b"\n", 0, complete - 1) >= 0:
            line = _add_lines(batch, block, line, marked, text_key)
        else:
            data = block.removeprefix(BYTE_ORDER_MARK) if marked else block
            yield from _long_line(data, Place(0, line, complete), text_key, batch)
            line += 1
        yield batch
        position, marked = position + complete, False


def _add_lines(batch: Batch, block: bytes, line: int, marked: bool, text_key: Selection) -> int:
    """Add the lines of a block, of which the first has the number `line`; the number after the last."""
    lines = block.split(b"\n")
    last, parse = line + len(lines) - 1, parser(text_key)  # after the last no line feed stands
    for number, data in enumerate(lines if lines[-1] else lines[:-1], start=line):
        text = data.removeprefix(BYTE_ORDER_MARK) if marked and number == line else data
        batch.add(parse(text), Place(0, number, len(data) + (number < last)))
    return last


def _long_line(data: bytes, place: Place, text_key: Selection, batch: Batch) -> Iterator[LongDocument]:
    """A JSON line of any length: parsed with stand-ins for its long strings, which are decoded in pieces."""
    if not _sound(_decoded(data[start : start + PIECE] for start in range(0, len(data), PIECE))):
        batch.skipped.append(("bad_utf8", place))
        return
    skeleton, spans = _set_apart(data)
    texts, reason, join = _texts_of(skeleton.decode("utf-8", "replace"), text_key)
    if not all(_sound(_unescaped(data, *span)) for name, span in spans.items() if name not in texts):
        batch.skipped.append(("bad_json", place))
    elif spans.keys().isdisjoint(texts):
        batch.add(corpus.encoded(None if reason else join.join(texts), reason), place)
    else:
        document = LongDocument(place, partial(_joined, data, texts, spans, join))
        yield from _checked(document, _reason(document), batch)


def _texts_of(line: str, key: Selection) -> tuple[list[str], str | None, str]:
    """The texts of a JSON line or the reason why there is none, and what stands between texts."""
    if isinstance(key, Fields):
        return *key.texts_of_line(line), key.join
    text, reason = corpus.text_of(line, key)
    return [] if text is None else [text], reason, ""


def _joined(data: bytes, texts: list[str], spans: dict[str, tuple[int, int]], join: str) -> Iterator[str]:
    """The texts with `join` between them, in pieces; those that stand in for a string of `data` are that string."""
    for number, text in enumerate(texts):
        if number:
            yield join
        yield from _unescaped(data, *spans[text]) if text in spans else (text,)


def _set_apart(data: bytes) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """`data` with a stand-in for each string of PIECE bytes or more, and the stand-ins' byte ranges in `data`."""
    mark = os.urandom(16).hex()  # no text holds it by accident
    parts, spans, copied, quote = [], {}, 0, data.find(b'"')
    while quote >= 0:
        close = data.find(b'"', quote + 1)
        while close >= 0 and _escaped(data, close):
            close = data.find(b'"', close + 1)
        if close < 0:
            break  # never ends: the parser will say so, of what is left
        if close - quote > PIECE:
            name = f"{mark}-{len(spans)}"
            parts += [data[copied : quote + 1], name.encode()]
            spans[name], copied = (quote + 1, close), close
        quote = data.find(b'"', close + 1)
    tail = data[copied:]
    if quote >= 0 and len(tail) > 2 * PIECE:
        tail = b'"'  # an unclosed string, however long, is one error
    return b"".join([*parts, tail]), spans


def _escaped(data: bytes, position: int) -> bool:
    """Whether an odd number of backslashes stands before `position`."""
    first = position
    while first and data[first - 1] == 0x5C:
        first -= 1
    return (position - first) % 2 == 1


def _sound(pieces: Iterator[str]) -> bool:
    """Whether these can be read to the end: what UTF-8, or what JSON allows in a string."""
    try:
        for _ in pieces:
            pass
    except ValueError:
        return False
    return True


def _unescaped(data: bytes, begin: int, end: int) -> Iterator[str]:
    """The JSON string inside bytes [begin, end) of `data`, in pieces. Raises ValueError where it is malformed."""
    while begin < end:
        found = _SAFE.search(data, begin + PIECE, end) if begin + PIECE < end else None
        cut = found.start() if found else end
        yield json.loads(f'"{data[begin:cut].decode("utf-8")}"')  # of bytes it would guess the encoding
        begin = cut
