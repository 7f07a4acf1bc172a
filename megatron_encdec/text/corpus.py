"""Documents out of text files, each one readable or counted with a reason.

    1. `list_files(inputs)`         files, directories and globs -> the files to read, in a fixed order
    2. `iter_raw(file)`             a file -> the bytes of each document and where it stands
    3. `parse(raw, text_key)`       those bytes -> text, or the reason why there is none
    4. `iter_documents(path, key)`  all of it at once

`.txt` and `.md` hold one document a file, `.jsonl` and `.jsonl.gz` one a line. Line endings inside a text
file are kept as they are. Bad content never raises: it is a record with a reason, so that accounts add up:

    empty         a blank line, an empty text, or one of white space only
    bad_json      the line is not a JSON object
    missing_key   the object lacks the text key
    not_text      the value under the key is no string
    bad_utf8      the bytes are not UTF-8, or the string holds half of a surrogate pair
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_encdec.platform.errors import IntegrityError, UserError

WHOLE_FILE_SUFFIXES = (".txt", ".md")
SUFFIXES = (*WHOLE_FILE_SUFFIXES, ".jsonl", ".jsonl.gz")
REASONS = ("empty", "bad_json", "missing_key", "not_text", "bad_utf8")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """A file as it was when listed: its `path` as the user gave it, `size` in bytes, `mtime_ns`."""

    path: str
    size: int
    mtime_ns: int


class RawDocument(NamedTuple):
    """A document's bytes, undecoded: `line` counts from 1; `consumed` is the bytes it took on disk."""

    file: str
    line: int
    data: bytes
    consumed: int


class Document(NamedTuple):
    """A document's `text`, or the `reason` why there is none; `size` is its bytes of decompressed input."""

    file: str
    line: int
    size: int
    text: str | None
    reason: str | None


def list_files(inputs: Iterable[str | Path]) -> list[InputFile]:
    """The files named by `inputs`, each once: inputs in the order given, files inside each sorted by path.

    Directories are searched to any depth; names starting with a dot are passed over. Raises `UserError` for a
    path that is not there, matches nothing, or has a suffix we do not read.
    """
    found: dict[str, InputFile] = {}
    for item in inputs:
        for path in _expand(str(item)):
            if not path.lower().endswith(SUFFIXES):
                raise UserError(f"{path}: cannot read this kind of file; supported: {', '.join(SUFFIXES)}"
                                + (f" (name a part of {item} with a glob such as '{item}/**/*.jsonl')"
                                   if os.path.isdir(str(item)) else ""))
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"{path}: cannot read the input: {error.strerror}") from None
            found.setdefault(os.path.realpath(path), InputFile(path, status.st_size, status.st_mtime_ns))
    if not found:
        raise UserError("no input given: name files, directories or globs of " + ", ".join(SUFFIXES))
    return list(found.values())


def _expand(item: str) -> list[str]:
    if item.startswith("hf:"):
        raise UserError(f"{item}: datasets from the hub are not supported yet; save it as .jsonl first")
    if os.path.isdir(item):
        paths = []
        for folder, subfolders, names in os.walk(item):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            paths += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        what = "no file in this directory"
    elif os.path.exists(item):
        return [item]
    elif glob.has_magic(item):
        paths = [path for path in glob.glob(item, recursive=True) if not os.path.isdir(path)]
        what = "no file matches this pattern"
    else:
        raise UserError(f"{item}: no such file or directory (input)")
    if not paths:
        raise UserError(f"{item}: {what} (input)")
    return sorted(paths)


def iter_raw(path: str | Path) -> Iterator[RawDocument]:
    """The documents of one file as bytes. Raises `UserError` if it cannot be read, `IntegrityError` if a
    `.gz` is damaged: what is lost behind the damage cannot be counted."""
    path = str(path)
    line = 0
    try:
        if path.lower().endswith(WHOLE_FILE_SUFFIXES):
            data = Path(path).read_bytes()
            yield RawDocument(path, 1, data, len(data))
            return
        with open(path, "rb") as raw:
            compressed = path.lower().endswith(".gz")
            position = 0
            for line, data in enumerate(gzip.GzipFile(fileobj=raw) if compressed else raw, start=1):
                consumed = raw.tell() - position if compressed else len(data)
                position += consumed
                yield RawDocument(path, line, data, consumed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise IntegrityError(f"{path}: damaged after line {line} ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the input: {error.strerror or error}") from None


def parse(raw: RawDocument, text_key: str) -> Document:
    """The text in `raw.data`, or the reason why there is none (see the table above)."""
    data = raw.data[3:] if raw.line == 1 and raw.data.startswith(BYTE_ORDER_MARK) else raw.data
    text = reason = None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        reason = "bad_utf8"
    if text is not None and not raw.file.lower().endswith(WHOLE_FILE_SUFFIXES):
        text, reason = _text_of_line(text, text_key)
    if text is not None and not text.strip():
        text, reason = None, "empty"
    return Document(raw.file, raw.line, len(raw.data), text, reason)


def _text_of_line(line: str, text_key: str) -> tuple[str | None, str | None]:
    if not line.strip():
        return None, "empty"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, a number of thousands of digits, or nested too deep
        return None, "bad_json"
    if not isinstance(value, dict):
        return None, "bad_json"
    if text_key not in value:
        return None, "missing_key"
    text = value[text_key]
    if not isinstance(text, str):
        return None, "not_text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None, "bad_utf8"
    return text, None


def iter_documents(path: str | Path, text_key: str = "text") -> Iterator[Document]:
    """Every document of the file at `path`, readable or not, in file order."""
    for raw in iter_raw(path):
        yield parse(raw, text_key)
