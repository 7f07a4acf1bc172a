"""Corpora as tests make and read them."""

import tempfile
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_encdec.text.chunks import chunks, slots
from megatron_encdec.text.documents import LongDocument, read_chunk
from megatron_encdec.text.indexed import IndexedFiles, IndexedWriter
from megatron_encdec.text.inputs import list_files


class Document(NamedTuple):
    """A document's text, or the reason why there is none; its bytes of decompressed input."""

    line: int
    size: int
    text: str | None
    reason: str | None


def documents_of(path, text_key="text") -> list[Document]:
    """All documents of one file, by line."""
    found = []
    with tempfile.TemporaryDirectory() as spool:
        for chunk in chunks(slots(list_files([path]), text_key), Path(spool), text_key):
            before, mine = len(found), []
            for part in read_chunk(chunk, text_key):
                if isinstance(part, LongDocument):
                    mine.append(Document(part.place.line, part.place.size, "".join(part.pieces()), None))
                    continue
                mine += [Document(place.line, place.size, text.decode(), None)
                         for place, text in zip(part.places_D, part.texts_D, strict=True)]
                mine += [Document(place.line, place.size, None, reason) for reason, place in part.skipped]
            found += sorted(document._replace(line=before + document.line) for document in mine)
    return found


def texts_of(path, text_key="text") -> list[str]:
    """Those of a file's documents that are readable."""
    return [document.text for document in documents_of(path, text_key) if document.text is not None]


def write_tokens(prefix, documents, dtype="uint16", at_once=1000) -> IndexedFiles:
    """PREFIX.bin and PREFIX.idx of `documents` (lists of ids), by the package's writer, `at_once` at a time."""
    prefix = Path(prefix)
    with IndexedWriter(prefix.parent, prefix.name, np.dtype(dtype)) as writer:
        writer.cut()
        for start in range(0, len(documents), at_once):
            append(writer, documents[start : start + at_once])
        files = writer.finish()
    prefix.with_name(f"{prefix.name}.lengths").unlink()
    return files


def append(writer: IndexedWriter, documents) -> None:
    """Add `documents` (lists of ids) to what is written."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(np.fromiter(chain.from_iterable(documents), writer.dtype).tobytes())
        file.flush()
        writer.append_file(file.name, np.array([len(document) for document in documents], np.int64))
