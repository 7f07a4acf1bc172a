"""The input cut into chunks: what one worker encodes at once and accounts for. The cuts depend on the files alone.

    1. `slots(files, key)`           chunks of plain files by byte range; compressed files and hub datasets whole
    2. `share_of(slots, i, n)`       the part of them that one machine of n works on
    3. `chunks(slots, spool, skip)`  slots in order, compressed ones cut into blocks of lines as they are read, remote
                                     ones fetched

A chunk of a plain `.jsonl` is the lines that *start* in its byte range, so a worker finds them by itself. Blocks
of a compressed file, and all that comes from elsewhere, wait for their worker in a spool file. Leaving out the first
`skip` chunks, those that an interrupted run has finished, leaves the numbers and cuts of the others as they were.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.corpus import hub_rows, kind_of
from megatron_encdec.text.fields import Selection, columns_of
from megatron_encdec.text.manifest import InputFile
from megatron_encdec.text.parquet import copy_rows, row_groups
from megatron_encdec.text.remote import cat, is_remote, open_input
from megatron_encdec.text.streams import PIECE, open_stream

CHUNK_BYTES = 16 << 20  # of decompressed input: large beside what a chunk costs by itself
CHUNK_FILES = 4096  # whole text files in one chunk, at most


@dataclass(frozen=True)
class Chunk:
    """A piece of the input. `kind`: `lines` (those that start in bytes [start, end) of the file), `texts` (whole
    files), `rows` (row group `start` of a Parquet file), and, among slots, `stream` and `hub` (still to be cut)."""

    kind: str
    paths: tuple[str, ...]  # what to read
    names: tuple[str, ...]  # what the user calls it
    start: int = 0
    end: int = 0
    consumed: int = 0  # bytes on disk
    first: bool = True  # begins its file, so its lines count from 1
    spooled: bool = False  # the path is a spool file of ours, to be deleted when the chunk is done


@dataclass
class Account:
    """A chunk's documents in one split, and what the tokenizer lost of them (`manifest.LOSSES`)."""

    documents: int = 0
    tokens: int = 0
    bytes_in: int = 0
    characters: int = 0
    sha256: str = ""  # of the ids
    special_tokens_in_text: int = 0
    unknown_tokens: int = 0
    dropped_characters: int = 0


@dataclass
class ChunkAccount:
    """A worker's answer. `skipped`: reason -> (count, bytes, first (file, line)s)."""

    number: int
    consumed: int
    lines: int = 0
    unproven: int = 0  # cuts inside long documents that the tokenizer does not make by itself
    splits: dict[str, Account] = field(default_factory=dict)
    skipped: dict[str, tuple[int, int, list[tuple[int, int]]]] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)  # tokens of each document; not in the journal


def slots(files: Sequence[InputFile], text_key: Selection) -> Iterator[Chunk]:
    """The input in order: ready chunks, and files that can only be cut while they are read."""
    texts: tuple[str, ...] = ()  # paths of text files that wait to be a chunk together
    held = 0  # bytes in them
    for file in files:
        kind, one = kind_of(file.path), (file.path,)
        if texts and (kind != "text" or len(texts) == CHUNK_FILES or held > CHUNK_BYTES
                      or is_remote(texts[0]) != is_remote(file.path)):
            yield Chunk("texts", texts, texts, consumed=held)
            texts, held = (), 0
        if kind == "text":
            texts += one
            held += file.size
        elif kind in ("stream", "hub"):
            yield Chunk(kind, one, one, consumed=file.size)
        elif kind == "rows":
            groups = row_groups(file.path, text_key)
            for group in range(groups):
                yield Chunk("rows", one, one, group, group + 1, file.size // groups, first=group == 0)
        else:
            for start in range(0, max(file.size, 1), CHUNK_BYTES):
                end = min(start + CHUNK_BYTES, file.size)
                yield Chunk("lines", one, one, start, end, end - start, first=start == 0)
    if texts:
        yield Chunk("texts", texts, texts, consumed=held)


def share_of(all_slots: Iterable[Chunk], index: int, count: int, total_bytes: int) -> Iterator[Chunk]:
    """The slots of machine `index` (from 1) of `count`: those that begin in its part of the input's bytes. Consecutive,
    so that the machines' outputs put together in order are the output of one machine. Raises `UserError` for a hub
    dataset, whose size is not known."""
    position = 0
    for slot in all_slots:
        if slot.kind == "hub" and count > 1:
            raise UserError(f"--shard {index}/{count}: cannot share out {slot.paths[0]}, whose size is not known; give "
                            "each machine configurations or splits of its own instead, or save it as files first")
        part = position * count // max(total_bytes, 1)
        if min(part, count - 1) == index - 1:  # an empty file may stand after the last byte
            yield slot
        position += slot.consumed


def chunks(all_slots: Iterable[Chunk], spool: Path, text_key: Selection, skip: int = 0) -> Iterator[Chunk]:
    """The chunks of `all_slots` after the first `skip`; blocks of streams are written into the folder `spool`."""
    number = 0
    for slot in all_slots:
        for chunk in _blocks(slot, spool, text_key, number, skip) if slot.kind in ("stream", "hub") else (slot,):
            number += 1
            if number > skip:
                is_elsewhere = not chunk.spooled and is_remote(chunk.paths[0])
                yield fetched(chunk, spool / f"block-{number - 1:06d}", text_key) if is_elsewhere else chunk


def fetched(chunk: Chunk, target: Path, text_key: Selection) -> Chunk:
    """`chunk`, whose files are elsewhere, with its part of them in files here, whose names begin with `target`."""
    url = chunk.paths[0]
    if chunk.kind == "texts":
        paths = tuple(f"{target}.{number:04d}" for number in range(len(chunk.paths)))
        for path, content in zip(paths, cat(chunk.paths), strict=True):
            Path(path).write_bytes(content)
        return replace(chunk, paths=paths, spooled=True)
    if chunk.kind == "rows":
        groups = copy_rows(url, text_key, chunk.start, target)
        return replace(chunk, paths=(str(target),), start=0, end=groups, spooled=True)
    with open_input(url) as source, open(target, "wb") as file:
        size = _copy_lines(source, chunk.start, chunk.end, file)
    return replace(chunk, paths=(str(target),), start=0, end=size, spooled=True)


def _copy_lines(source: BinaryIO, start: int, end: int, file: BinaryIO) -> int:
    """Write the lines that start in bytes [start, end) of `source`; how many bytes they are."""
    size, position, rest = 0, start, b""
    if start:  # the first line after the byte before
        position = source.seek(start - 1)
        found = 0
        while not found and position < end and (piece := source.read(PIECE)):
            found = piece.find(b"\n") + 1
            position, rest = position + (found or len(piece)), piece[found:] if found else b""
        if not found or position >= end:
            return 0
    while piece := rest or source.read(PIECE):
        cut = piece.find(b"\n", max(0, end - 1 - position)) + 1 if position + len(piece) >= end else 0
        rest = b""
        size += file.write(piece[:cut] if cut else piece)
        position += len(piece)
        if cut:
            break
    return size


def _blocks(slot: Chunk, spool: Path, text_key: Selection, number: int, skip: int) -> Iterator[Chunk]:
    """Blocks of at least CHUNK_BYTES up to the next line's end; the cuts do not depend on how reads come."""
    if slot.kind == "hub":
        rows = hub_rows(slot.paths[0], columns_of(text_key))
        yield from _cut(lambda: next(rows, b""), lambda: 0, slot, spool, number, skip)
    else:
        with open_stream(slot.paths[0]) as stream:
            yield from _cut(lambda: stream.read(PIECE), lambda: stream.consumed, slot, spool, number, skip)


def _cut(read: Callable[[], bytes], consumed: Callable[[], int], slot: Chunk, spool: Path, number: int,
         skip: int) -> Iterator[Chunk]:
    rest, first, before = b"", True, 0
    while True:
        target = spool / f"block-{number:06d}"
        size = 0
        with open(target if number >= skip else os.devnull, "wb") as file:
            cut = 0
            while not cut and (piece := rest or read()):
                if size + len(piece) >= CHUNK_BYTES:
                    cut = piece.find(b"\n", max(0, CHUNK_BYTES - 1 - size)) + 1
                taken, rest = (piece[:cut], piece[cut:]) if cut else (piece, b"")
                size += file.write(taken)
        if not size:
            target.unlink(missing_ok=True)
            return
        yield replace(slot, kind="lines", paths=(str(target),), end=size, consumed=consumed() - before, first=first,
                      spooled=True)
        number, first, before = number + 1, False, consumed()
