"""Where documents come from: files, directories, globs and hub datasets, and what one document's bytes mean.

    1. `list_files(inputs)`         what the user named -> the files to read, in a fixed order
    2. `open_stream(file)`          a compressed file as a stream of its decompressed bytes
    3. `text_of(line, key)`         a JSON line -> its text, or the reason why there is none
    4. `iter_lines(path)`           a text file's lines as bytes, decompressed (labelled sets too)
    5. `iter_documents(path, key)`  every document of a file, one by one (for training a tokenizer, samples)

`.txt` and `.md` hold one document a file, `.jsonl` (plain, `.gz` or `.zst`) one a line, `.parquet` one a row.
`hf:NAME[:CONFIG[:SPLIT]]` streams a dataset through the `datasets` library. Line endings inside a text file are
kept as they are. Bad content never raises: it is a document with a reason, so that accounts add up:

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from megatron_encdec.platform.errors import IntegrityError, UserError

WHOLE_FILE_SUFFIXES = (".txt", ".md")
STREAMED_SUFFIXES = (".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*WHOLE_FILE_SUFFIXES, ".jsonl", *STREAMED_SUFFIXES, ".parquet")
HUB = "hf:"
REASONS = ("empty", "bad_json", "missing_key", "not_text", "bad_utf8")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PIECE = 1 << 20  # bytes read at once from a stream


@dataclass(frozen=True)
class InputFile:
    """A file as it was when listed: its `path` as the user gave it, `size` in bytes, `mtime_ns`.

    A hub dataset has its whole `hf:` name as path, and size and time 0.
    """

    path: str
    size: int
    mtime_ns: int

    @property
    def kind(self) -> str:
        """How it is read: `hub`, `text` (one document), `lines`, `stream` (compressed lines) or `rows`."""
        lower = self.path.lower()
        if self.path.startswith(HUB):
            return "hub"
        if lower.endswith(WHOLE_FILE_SUFFIXES):
            return "text"
        if lower.endswith(STREAMED_SUFFIXES):
            return "stream"
        return "rows" if lower.endswith(".parquet") else "lines"


class Document(NamedTuple):
    """A document's `text`, or the `reason` why there is none; `size` is its bytes of decompressed input."""

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
    for item in map(str, inputs):
        if item.startswith(HUB) and os.path.exists(item):
            item = os.path.join(".", item)  # a file of that name, not a dataset of the hub
        if item.startswith(HUB):
            found.setdefault(item, InputFile(item, 0, 0))
            continue
        for path in _expand(item):
            if not path.lower().endswith(SUFFIXES):
                raise UserError(f"{path}: cannot read this kind of file; supported: {', '.join(SUFFIXES)}"
                                + (f" (name a part of {item} with a glob such as '{item}/**/*.jsonl')"
                                   if os.path.isdir(item) else ""))
            try:
                path.encode("utf-8")
                status = os.stat(path)
            except UnicodeEncodeError:
                raise UserError(f"{path!r}: the file's name is not UTF-8; rename it") from None
            except OSError as error:
                raise UserError(f"{path}: cannot read the input: {error.strerror}") from None
            found.setdefault(os.path.realpath(path), InputFile(path, status.st_size, status.st_mtime_ns))
    if not found:
        raise UserError("no input given: name files, directories or globs of " + ", ".join(SUFFIXES))
    return list(found.values())


def _expand(item: str) -> list[str]:
    if os.path.isdir(item):
        paths = []
        for folder, subfolders, names in os.walk(item):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            paths += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        what = "no file in this directory"
    elif os.path.exists(item):
        return [item]
    elif glob.has_magic(item):
        paths = [path for path in glob.glob(_pattern(item), recursive=True) if not os.path.isdir(path)]
        what = "no file matches this pattern"
    else:
        raise UserError(f"{item}: no such file or directory (input)")
    if not paths:
        raise UserError(f"{item}: {what} (input)")
    return sorted(paths)


def _pattern(item: str) -> str:
    """`item` as a glob, in which the folders that are there under just these names are no pattern."""
    there = item
    while there and not os.path.isdir(there):
        there = os.path.dirname(there)
    return glob.escape(there) + item[len(there):]


def hub_name(name: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split of `NAME[:CONFIG[:SPLIT]]`; a local path that is there may hold colons itself."""
    parts = name.split(":")
    whole = next((count for count in range(len(parts), 0, -1) if os.path.exists(":".join(parts[:count]))), 1)
    config, split = [*":".join(parts[whole:]).split(":", 1), ""][:2]
    return ":".join(parts[:whole]), config or None, split or None


class Stream:
    """Decompressed bytes of a `.gz` or `.zst` file: `read(count)`; `consumed` counts bytes taken on disk."""

    def __init__(self, raw: BinaryIO, path: str):
        self._raw, self._path, self._lines = raw, path, 0
        if path.lower().endswith(".gz"):
            self._source = gzip.GzipFile(fileobj=raw)
        else:
            import pyarrow  # comes with datasets

            self._source = pyarrow.CompressedInputStream(raw, "zstd")

    def read(self, count: int) -> bytes:
        """Up to `count` bytes, none at the end. Raises `IntegrityError` where the file is damaged: what is lost
        behind the damage cannot be counted."""
        try:
            piece = self._source.read(count)
        except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
            raise IntegrityError(f"{self._path}: damaged after line {self._lines} ({error}); copy it again") from None
        self._lines += piece.count(b"\n")
        return piece

    @property
    def consumed(self) -> int:
        """Bytes of the compressed file taken so far."""
        return self._raw.tell()


@contextmanager
def open_stream(path: str) -> Iterator[Stream]:
    """The decompressed bytes of the compressed file at `path`. Raises `UserError` if it cannot be read."""
    try:
        raw = open(path, "rb")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"{path}: cannot read the input: {error.strerror}") from None
    with raw:
        yield Stream(raw, path)


def hub_rows(name: str, text_key: str) -> Iterator[bytes]:
    """The rows of `hf:NAME[:CONFIG[:SPLIT]]` (split `train` by default) as JSON lines that hold the text alone.

    Streamed: nothing but the rows at hand is in memory or on disk. No code of the dataset is run.
    """
    from datasets import load_dataset

    dataset, config, split = hub_name(name.removeprefix(HUB))
    try:
        rows = load_dataset(dataset, config, split=split or "train", streaming=True)
        for row in rows:
            value = {text_key: row[text_key]} if text_key in row else {}
            if not isinstance(value.get(text_key, ""), str):
                value[text_key] = None
            try:
                yield json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
            except UnicodeEncodeError:  # half a surrogate pair: escaped, so that it is counted as such
                yield json.dumps(value).encode() + b"\n"
    except Exception as error:  # noqa: BLE001  (network, hub, parsing: whatever it is, the user needs one line)
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: cannot read this dataset ({type(error).__name__}: {reason}); check the name, the "
                        "configuration and the network, or save it as files first") from None


def text_of(line: str, text_key: str) -> tuple[str | None, str | None]:
    """(text, None) of a JSON line, or (None, reason)."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nested too deep
        return None, "bad_json" if line.strip() else "empty"
    if not isinstance(value, dict):
        return None, "bad_json"
    if text_key not in value:
        return None, "missing_key"
    text = value[text_key]
    if not isinstance(text, str):
        return None, "not_text"
    return (None, "empty") if not text or text.isspace() else (text, None)


def parse_line(data: bytes, text_key: str) -> tuple[str | None, bytes | None, str | None]:
    """(text, its UTF-8 bytes, None) of a JSON line's bytes, or (None, None, reason).

    orjson takes half the time of Python's parser, for the lines that both take alike; what it refuses (NaN, depth,
    half surrogate pairs, mistakes of any kind) is for Python's parser to judge.
    """
    try:
        text = orjson.loads(data)[text_key]
        if text.__class__ is str and text and not text.isspace():
            return text, text.encode(), None
    except (ValueError, LookupError, TypeError):
        pass
    try:
        text, reason = text_of(data.decode("utf-8"), text_key)
        return text, None if text is None else text.encode("utf-8"), reason
    except UnicodeError:  # decoding: not UTF-8; encoding: half a surrogate pair
        return None, None, "bad_utf8"


def parse_text(data: bytes) -> tuple[str | None, bytes | None, str | None]:
    """The same for a whole text file's bytes."""
    data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None, None, "bad_utf8"
    return (None, None, "empty") if not text or text.isspace() else (text, data, None)


def iter_documents(path: str | Path, text_key: str = "text") -> Iterator[Document]:
    """Every document of the file (or hub dataset) at `path`, readable or not, in order."""
    path = str(path)
    kind = InputFile(path, 0, 0).kind
    if kind == "text":
        data = read_file(path)
        text, _, reason = parse_text(data)
        yield Document(1, len(data), text, reason)
        return
    if kind == "rows":
        from megatron_encdec.text.parquet import iter_rows

        for row, data in enumerate(iter_rows(path, text_key), start=1):
            text, _, reason = parse_text(bytes(data)) if data is not None else (None, None, "not_text")
            yield Document(row, len(data or b""), text, reason)
        return
    lines = hub_rows(path, text_key) if kind == "hub" else iter_lines(path)
    for number, line in enumerate(lines, start=1):
        text, _, reason = parse_line(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, text_key)
        yield Document(number, len(line), text, reason)


def iter_lines(path: str) -> Iterator[bytes]:
    """The lines of a text file, plain or compressed (`.gz`, `.zst`), as bytes with their line feeds.

    Raises `UserError` if it cannot be read, `IntegrityError` where a compressed one is damaged.
    """
    if path.lower().endswith((".gz", ".zst")):
        with open_stream(path) as stream:
            rest = b""
            while piece := stream.read(PIECE):
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line + b"\n" for line in lines)
            if rest:
                yield rest
    else:
        try:
            with open(path, "rb") as file:
                yield from file
        except OSError as error:
            raise UserError(f"{path}: cannot read the input: {error.strerror}") from None


def read_file(path: str) -> bytes:
    """The bytes of an input file; a `UserError` if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the input: {error.strerror}") from None
