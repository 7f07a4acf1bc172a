"""Text taken from all over the input: to compare encoders on, and to train a tokenizer on.

    1. `sample_texts(files, key)`    a few documents from each of a few places
    2. `ensure_tokenizer(...)`       a tokenizer of the user's own text, unless it is there
"""

import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.progress import Progress
from megatron_encdec.text.chunks import chunks, slots
from megatron_encdec.text.corpus import hub_rows, kind_of, parse_line
from megatron_encdec.text.documents import LongDocument, read_chunk
from megatron_encdec.text.heads import BYTE_ORDER_MARK
from megatron_encdec.text.manifest import InputFile
from megatron_encdec.text.parquet import iter_rows
from megatron_encdec.text.streams import open_stream, reading
from megatron_encdec.text.tokenizer import train_tokenizer
from megatron_encdec.text.tokenizer_models import find_model_file

PLACES = 16
BYTES_A_PLACE = 64 << 10
DOCUMENTS_A_PLACE = 64
TRAINING_BYTES = 2 << 30  # a vocabulary does not change with more


def sample_texts(files: list[InputFile], text_key: str) -> list[str]:
    """Readable texts from up to `PLACES` places, spread over the files and over a large file's length. At most
    `BYTES_A_PLACE` of each, whatever the length of a document; where the input is small, all of it."""
    total = sum(file.size for file in files)
    texts: list[str] = []
    for file in files[:: -(-len(files) // PLACES)]:
        places = max(1, PLACES * file.size // max(total, 1)) if len(files) < PLACES else 1
        if kind_of(file.path) != "lines":
            texts += _head(file.path, text_key)
            continue
        for position in (place * file.size // places for place in range(places)):
            texts += _texts_of(_read_at(file.path, position), position == 0, text_key)
    return texts


def _head(path: str, text_key: str) -> list[str]:
    kind = kind_of(path)
    if kind == "stream":
        with open_stream(path) as stream:
            return _texts_of(stream.read(BYTES_A_PLACE), True, text_key)
    if kind == "text":
        return [_read_at(path, 0).removeprefix(BYTE_ORDER_MARK).decode("utf-8", "ignore")]
    if kind == "rows":
        texts = (bytes((data or b"")[:BYTES_A_PLACE]).decode("utf-8", "ignore") for data in iter_rows(path, text_key))
    else:
        texts = (parse_line(line, text_key)[0] or "" for line in hub_rows(path, text_key))
    found, size = [], 0
    for text in islice(texts, DOCUMENTS_A_PLACE):
        found.append(text[: BYTES_A_PLACE - size])
        size += len(text)
        if size >= BYTES_A_PLACE:
            break
    return found


def _read_at(path: str, position: int) -> bytes:
    with reading(path), open(path, "rb") as file:
        file.seek(position)
        return file.read(BYTES_A_PLACE)


def _texts_of(block: bytes, first: bool, text_key: str) -> list[str]:
    """The texts of a block's whole lines; of a line that is longer than a block, the JSON itself."""
    lines = block.split(b"\n")
    cut = [lines[-1]] if len(block) == BYTES_A_PLACE else []
    whole = lines[0 if first else 1 : len(lines) - len(cut)]
    parsed = (parse_line(line, text_key)[0] for line in whole[:DOCUMENTS_A_PLACE])
    return [text for text in parsed if text is not None] + [
        line.decode("utf-8", "ignore") for line in cut if len(line) > BYTES_A_PLACE // 2]


def ensure_tokenizer(files: list[InputFile], path: str | Path, text_key: str, vocabulary_size: int,
                     show: bool) -> None:
    """Train the tokenizer at `path` unless one is there: on all documents, of a large input on every n-th."""
    path = Path(path)
    if find_model_file(path):
        if show:
            print(f"{path}: this tokenizer is there already and is used as it is", file=sys.stderr)
        return
    if path.suffix in (".json", ".model"):
        raise UserError(f"{path}: no such file; a tokenizer is trained into a directory: give its name")
    total = sum(file.size for file in files)
    every = max(1, round(total / TRAINING_BYTES))
    with Progress("train tokenizer", total, show) as progress:
        tokenizer = train_tokenizer(islice(_texts(files, text_key, progress), 0, None, every), vocabulary_size, path)
    if show:
        few = (f" (the text holds no more; {vocabulary_size} were asked for)"
               if tokenizer.vocabulary_size < vocabulary_size else "")
        which = f", on one document in {every}" if every > 1 else ""
        print(f"{path}: trained a byte-level BPE of {tokenizer.vocabulary_size} entries{few}{which}", file=sys.stderr)


def _texts(files: list[InputFile], text_key: str, progress: Progress) -> Iterator[str]:
    read = 0
    with tempfile.TemporaryDirectory() as spool:
        for chunk in chunks(slots(files, text_key), Path(spool), text_key):
            for part in read_chunk(chunk, text_key):
                if isinstance(part, LongDocument):
                    yield "".join(part.pieces())
                else:
                    yield from map(bytes.decode, part.texts_D)
            read += chunk.consumed
            progress.update(read, f"{read / 1e6 / progress.elapsed():.1f} MB/s read")
            if chunk.spooled:
                Path(chunk.paths[0]).unlink()
