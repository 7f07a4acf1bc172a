"""A worker's view of a chunk: batches of ordinary documents, and long ones piece by piece.

    1. `read_chunk(chunk, key)`   yields `Batch`es and `LongDocument`s in document order
    2. `Batch`                    texts as UTF-8 bytes with what they took; the skipped ones with their reason
    3. `LongDocument`             a document too large to be held several times over: its text as an iterator

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
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.chunks import Chunk
from megatron_encdec.text.corpus import encoded, parse_line, parse_text, reason_of_zeros, text_of
from megatron_encdec.text.heads import BYTE_ORDER_MARK, UTF16_BYTES, is_utf16
from megatron_encdec.text.parquet import iter_rows
from megatron_encdec.text.streams import reading

LONG = 4 << 20  # bytes from which a document is handled piece by piece
PIECE = 1 << 20  # bytes of a long document decoded at once
ROWS_IN_BATCH, BYTES_IN_BATCH = 4096, 16 << 20
# Before an escape (the second half of a surrogate pair apart), or before a character that no escape reaches.
_SAFE = re.compile(rb"(?<!\\)\\(?!u[dD][c-fC-F])|(?<=[^\\]{6})[^\\\x80-\xbf]")


@dataclass
class Batch:
    """Documents in order: D readable ones, and those `skipped`."""

    texts_D: list[bytes] = field(default_factory=list)  # UTF-8
    sizes_D: list[int] = field(default_factory=list)  # bytes of input
    characters_D: list[int] = field(default_factory=list)
    places_D: list[tuple[int, int]] = field(default_factory=list)  # (file of the chunk, line)
    skipped: list[tuple[str, int, int, int]] = field(default_factory=list)  # (reason, file, line, size)

    def add(self, parsed: tuple, file: int, line: int, size: int) -> None:
        """Add what `parse_line` or `parse_text` said of a document."""
        text, data, reason = parsed
        if reason is None:
            self.texts_D.append(data)
            self.sizes_D.append(size)
            self.characters_D.append(len(text))
            self.places_D.append((file, line))
        else:
            self.skipped.append((reason, file, line, size))


@dataclass
class LongDocument:
    """A readable document of `size` bytes of input: `pieces()` iterates over its text, as often as asked."""

    file: int
    line: int
    size: int
    pieces: Callable[[], Iterator[str]]


def read_chunk(chunk: Chunk, text_key: str) -> Iterator[Batch | LongDocument]:
    """The documents of `chunk`; lines count from 1 within the chunk. The last item is a `Batch`."""
    readers = {"texts": _read_texts, "rows": _read_rows, "lines": _read_lines}
    return readers[chunk.kind](chunk, text_key)


def _read_texts(chunk: Chunk, _text_key: str) -> Iterator[Batch | LongDocument]:
    batch = Batch()
    for file, path in enumerate(chunk.paths):
        with reading(path):
            size = os.path.getsize(path)
            data = Path(path).read_bytes() if size < LONG else b""
        if size < LONG:
            batch.add(parse_text(data), file, 1, len(data))
            continue
        yield batch
        batch = Batch()
        yield from _long_text(partial(_file_pieces, path), file, 1, size, batch)
    yield batch


def _file_pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield file.read(PIECE).removeprefix(BYTE_ORDER_MARK)
        yield from iter(partial(file.read, PIECE), b"")


def _read_rows(chunk: Chunk, text_key: str) -> Iterator[Batch | LongDocument]:
    batch, held = Batch(), 0
    for row, data in enumerate(iter_rows(chunk.paths[0], text_key, range(chunk.start, chunk.end)), start=1):
        size = len(data or b"")
        if data is None:
            batch.skipped.append(("not_text", 0, row, 0))
        elif size < LONG:
            batch.add(parse_text(bytes(data)), 0, row, size)
            held += size
        else:
            yield batch
            batch, held = Batch(), 0
            yield from _long_text(partial(_row_pieces, data), 0, row, size, batch)
        if len(batch.texts_D) >= ROWS_IN_BATCH or held >= BYTES_IN_BATCH:
            yield batch
            batch, held = Batch(), 0
    yield batch


def _row_pieces(data: bytes | memoryview) -> Iterator[bytes]:
    begin = len(BYTE_ORDER_MARK) if bytes(data[: len(BYTE_ORDER_MARK)]) == BYTE_ORDER_MARK else 0  # views are signed
    return (bytes(data[start : start + PIECE]) for start in range(begin, len(data), PIECE))


def _long_text(raw: Callable[[], Iterator[bytes]], file: int, line: int, size: int, batch: Batch
               ) -> Iterator[LongDocument]:
    """The document whose bytes are `raw()`, all of them text; if it is not readable, its reason goes to `batch`."""
    head = b"".join(islice(raw(), -(-UTF16_BYTES // PIECE)))[:UTF16_BYTES]
    reason = reason_of_zeros(chain([head], raw())) if b"\0" in head[:2] else None
    document = LongDocument(file, line, size, lambda: _decoded(raw()))
    reason = reason or _reason(document)
    yield from _checked(document, "utf16" if reason == "bad_utf8" and is_utf16(head) else reason, batch)


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
            halved = halved or encoded(piece, None)[2]  # and on: what is no JSON further on counts as that
    except UnicodeError:
        return "bad_utf8"
    except ValueError:
        return "bad_json"
    return halved or ("empty" if blank else None)


def _checked(document: LongDocument, reason: str | None, batch: Batch) -> Iterator[LongDocument]:
    if reason is None:
        yield document
    else:
        batch.skipped.append((reason, document.file, document.line, document.size))


def _read_lines(chunk: Chunk, text_key: str) -> Iterator[Batch | LongDocument]:
    try:
        with reading(chunk.names[0]), open(chunk.paths[0], "rb") as file:
            start = 0 if chunk.start == 0 else _next_line(file, chunk.start - 1, chunk.end)
            if start >= chunk.end and chunk.end:
                yield Batch()
                return
            end = _next_line(file, chunk.end - 1) if chunk.end else 0
            file.seek(start)
            bom = chunk.first and start == 0
            yield from _split(file, start, end, bom, text_key)
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


def _split(file, position: int, end: int, bom: bool, text_key: str) -> Iterator[Batch | LongDocument]:
    """The lines in bytes [position, end) of `file`: a run of ordinary ones at once, long ones by themselves. Raises
    EOFError where the file has fewer bytes."""
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
            _add_lines(batch, block, line, bom, text_key)
            line += block.count(b"\n")
        else:
            data = block.removeprefix(BYTE_ORDER_MARK) if bom else block
            yield from _long_line(data, complete, line, text_key, batch)
            line += 1
        yield batch
        position, bom = position + complete, False


def _add_lines(batch: Batch, block: bytes, line: int, bom: bool, text_key: str) -> None:
    lines = block.split(b"\n")
    last = line + len(lines) - 1  # after it no line feed stands
    for number, data in enumerate(lines if lines[-1] else lines[:-1], start=line):
        text = data.removeprefix(BYTE_ORDER_MARK) if bom and number == line else data
        batch.add(parse_line(text, text_key), 0, number, len(data) + (number < last))


def _long_line(data: bytes, size: int, line: int, text_key: str, batch: Batch) -> Iterator[LongDocument]:
    """A JSON line of any length: parsed with stand-ins for its long strings, which are decoded in pieces."""
    if not _sound(_decoded(data[start : start + PIECE] for start in range(0, len(data), PIECE))):
        batch.skipped.append(("bad_utf8", 0, line, size))
        return
    skeleton, spans = _set_apart(data)
    text, reason = text_of(skeleton.decode("utf-8", "replace"), text_key)
    if not all(_sound(_unescaped(data, *span)) for name, span in spans.items() if name != text):
        batch.skipped.append(("bad_json", 0, line, size))
    elif text not in spans:
        batch.add(encoded(text, reason), 0, line, size)
    else:
        document = LongDocument(0, line, size, partial(_unescaped, data, *spans[text]))
        yield from _checked(document, _reason(document), batch)


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
