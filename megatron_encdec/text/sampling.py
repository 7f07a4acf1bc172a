"""A look into the input.

    1. `sample_texts(files, key)`   texts, on which encoders are compared before the work begins
    2. `keys_there(path)`           the keys that documents have, for who named one that they do not have
"""

import json
from itertools import islice

from megatron_encdec.text.corpus import BYTE_ORDER_MARK, hub_rows, iter_lines, kind_of
from megatron_encdec.text.fields import Selection, columns_of, leaves, parser
from megatron_encdec.text.manifest import InputFile
from megatron_encdec.text.parquet import iter_rows, iter_selected, skeleton_of
from megatron_encdec.text.remote import is_remote, open_input
from megatron_encdec.text.streams import open_stream, reading

PLACES, BYTES_A_PLACE, DOCUMENTS_A_PLACE = 16, 64 << 10, 64
LINES_LOOKED_AT = 100  # for the keys that they have


def sample_texts(files: list[InputFile], text_key: Selection) -> list[str]:
    """Readable texts from up to `PLACES` places, spread over the files and over a large file's length. At most
    `BYTES_A_PLACE` of each, whatever the length of a document; where the input is small, all of it."""
    total = sum(file.size for file in files)
    texts: list[str] = []
    for file in files[:: -(-len(files) // PLACES)]:
        places = max(1, PLACES * file.size // max(total, 1)) if len(files) < PLACES else 1
        places = 1 if is_remote(file.path) else places  # the beginning is there at once
        if kind_of(file.path) != "lines":
            texts += _head(file.path, text_key)
            continue
        for position in (place * file.size // places for place in range(places)):
            texts += _texts_of(_read_at(file.path, position), position == 0, text_key)
    return texts


def keys_there(path: str) -> list[str]:
    """The keys of the first JSON object among the first lines of a file, or of a Parquet file's columns; [] where
    there is none."""
    kind = kind_of(path)
    if kind == "rows":
        return leaves(skeleton_of(path))
    lines = () if kind == "text" else hub_rows(path, None) if kind == "hub" else iter_lines(path)
    for line in islice(lines, LINES_LOOKED_AT):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and value:
            return leaves(value)
    return []


def _head(path: str, text_key: Selection) -> list[str]:
    kind = kind_of(path)
    if kind == "stream":
        with open_stream(path) as stream:
            return _texts_of(stream.read(BYTES_A_PLACE), True, text_key)
    if kind == "text":
        return [_read_at(path, 0).removeprefix(BYTE_ORDER_MARK).decode("utf-8", "ignore")]
    if kind == "rows":
        texts = (bytes((data or b"")[:BYTES_A_PLACE]).decode("utf-8", "ignore") for data in iter_rows(path, text_key)
                 ) if isinstance(text_key, str) else (text or "" for text, _, _ in iter_selected(path, text_key, [0]))
    else:
        texts = (parser(text_key)(line)[0] or "" for line in hub_rows(path, columns_of(text_key)))
    found, size = [], 0
    for text in islice(texts, DOCUMENTS_A_PLACE):
        found.append(text[: BYTES_A_PLACE - size])
        size += len(text)
        if size >= BYTES_A_PLACE:
            break
    return found


def _read_at(path: str, position: int) -> bytes:
    with reading(path), open_input(path) as file:
        file.seek(position)
        return file.read(BYTES_A_PLACE)


def _texts_of(block: bytes, first: bool, text_key: Selection) -> list[str]:
    """The texts of a block's whole lines; of a line that is longer than a block, the JSON itself."""
    lines = block.split(b"\n")
    cut = [lines[-1]] if len(block) == BYTES_A_PLACE else []
    whole = lines[0 if first else 1 : len(lines) - len(cut)]
    parsed = (parser(text_key)(line)[0] for line in whole[:DOCUMENTS_A_PLACE])
    return [text for text in parsed if text is not None] + [
        line.decode("utf-8", "ignore") for line in cut if len(line) > BYTES_A_PLACE // 2]
