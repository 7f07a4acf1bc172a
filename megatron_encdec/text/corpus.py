"""What the bytes of an input mean: a document's text, or the reason why there is none.

    1. `kind_of(path)`          how an input is read, by its name
    2. `parse_line(line, key)`  a JSON line -> its text, or the reason; `parse_text` of a whole file (fields.py: of
                                nested keys, several, or with a filter)
    3. `iter_lines(path)`       a text file's lines as bytes, decompressed (labelled sets too); `hub_rows` of a dataset

`.txt` and `.md` hold one document a file, `.jsonl`, `.json` and `.ndjson` (plain, `.gz` or `.zst`) one a line,
`.parquet` one a row; `hf:NAME[:CONFIG[:SPLIT]]` streams a dataset through the `datasets` library. Line endings inside a
text file are kept as they are. Bad content never raises: it is a document with one of `REASONS` (docs/data.md says more
of each), so that accounts add up. What is wrong with a whole file is refused when it is listed (`text/inputs.py`).
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence

import orjson

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.remote import bare, is_remote, open_input
from megatron_encdec.text.streams import PACKERS, PIECE, open_stream, packer_of, reading

WHOLE_FILE_SUFFIXES = (".txt", ".md")
LINES_SUFFIXES = (".jsonl", ".json", ".ndjson")
STREAMED_SUFFIXES = tuple(suffix + packed for suffix in LINES_SUFFIXES for packed in PACKERS)
SUFFIXES = (*WHOLE_FILE_SUFFIXES, *LINES_SUFFIXES, *STREAMED_SUFFIXES, ".parquet")
HUB = "hf:"
ZEROS = b"\0 \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # the last, and the first with two zeros: UTF-32
UTF16_BYTES = 1024  # looked at for UTF-16 without a mark
REASONS = {"empty": "no text, or white space only", "bad_json": "not a JSON object", "missing_key": "no such key",
           "not_text": "the value is no string", "bad_utf8": "not UTF-8; from Latin-1: iconv -f LATIN1 -t UTF-8",
           "utf16": "not UTF-8; iconv -f UTF-16 -t UTF-8", "no_tokens": "the tokenizer has no tokens for it",
           "filtered": "left out by --where"}


def kind_of(path: str) -> str:
    """How an input is read: `hub`, `text` (one document), `lines`, `stream` (compressed lines) or `rows`."""
    lower = bare(path).lower()
    if path.startswith(HUB) and not is_remote(path):
        return "hub"
    if lower.endswith(WHOLE_FILE_SUFFIXES):
        return "text"
    if lower.endswith(STREAMED_SUFFIXES):
        return "stream"
    return "rows" if lower.endswith(".parquet") else "lines"


def hub_name(name: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split of `NAME[:CONFIG[:SPLIT]]`; a local path that is there may hold colons itself."""
    parts = name.split(":")
    whole = next((count for count in range(len(parts), 0, -1) if os.path.exists(":".join(parts[:count]))), 1)
    config, split = [*":".join(parts[whole:]).split(":", 1), ""][:2]
    return ":".join(parts[:whole]), config or None, split or None


def hub_rows(name: str, columns: Sequence[str] | None) -> Iterator[bytes]:
    """The rows of `hf:NAME[:CONFIG[:SPLIT]]` (split `train` by default) as JSON lines that hold these `columns` alone
    (of `a.b` the column a, where there is no other; None: all). Streamed: nothing but the rows at hand is in memory or
    on disk. No code of the dataset is run."""
    from datasets import load_dataset

    dataset, config, split = hub_name(name.removeprefix(HUB))
    count = 0
    try:
        rows = load_dataset(dataset, config, split=split or "train", streaming=True)
        for row in rows:
            count += 1
            names = row if columns is None else [
                name for column in columns for name in (column, column.partition(".")[0]) if name in row]
            value = {name: row[name] for name in names}
            try:
                yield json.dumps(value, ensure_ascii=False, default=_nothing).encode("utf-8") + b"\n"
            except UnicodeEncodeError:  # half a surrogate pair: escaped, so that it is counted as such
                yield json.dumps(value, default=_nothing).encode() + b"\n"
    except Exception as error:  # noqa: BLE001  (network, hub, parsing: whatever it is, the user needs one line)
        reason = " ".join(str(error).split())[:300]
        if count:
            raise UserError(f"{name}: breaks off after row {count:,} ({type(error).__name__}: {reason}); the same "
                            "command tries again; if it stays so, save the dataset as files first") from None
        raise UserError(f"{name}: cannot read this dataset ({type(error).__name__}: {reason}); check the name, the "
                        "configuration and the network, or save it as files first") from None


def _nothing(_: object) -> None:
    """What JSON has no word for is no text either."""


def text_of(line: str, text_key: str) -> tuple[str | None, str | None]:
    """(text, None) of a JSON line, or (None, reason)."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nested too deep
        return None, "bad_json" if line.strip() else "empty"
    if not isinstance(value, dict):
        return None, "bad_json"
    text = value.get(text_key)
    if not isinstance(text, str):
        return None, "not_text" if text_key in value else "missing_key"
    return (None, "empty") if not text or text.isspace() else (text, None)


def parse_line(data: bytes, text_key: str) -> tuple[str | None, bytes | None, str | None]:
    """(text, its UTF-8 bytes, None) of a JSON line's bytes, or (None, None, reason). orjson takes half the time of
    Python's parser; what it refuses (NaN, depth, half surrogate pairs, mistakes of any kind) is for that to judge."""
    try:
        text = orjson.loads(data)[text_key]
        if text.__class__ is str and text and not text.isspace():
            return text, text.encode(), None
    except (ValueError, LookupError, TypeError):
        pass
    try:
        return encoded(*text_of(data.decode("utf-8"), text_key))
    except UnicodeDecodeError:
        return None, None, "bad_utf8"


def encoded(text: str | None, reason: str | None) -> tuple[str | None, bytes | None, str | None]:
    """What `text_of` said, with the text's UTF-8 bytes."""
    try:
        return text, None if text is None else text.encode("utf-8"), reason
    except UnicodeEncodeError:  # half a surrogate pair
        return None, None, "bad_utf8"


def parse_text(data: bytes) -> tuple[str | None, bytes | None, str | None]:
    """The same for a whole text file's bytes, without a byte order mark."""
    if b"\0" in data[:2] and (reason := reason_of_zeros([data])):
        return None, None, reason
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None, None, "utf16" if is_utf16(data) else "bad_utf8"
    return (None, None, "empty") if not text or text.isspace() else (text, data, None)


def reason_of_zeros(pieces: Iterable[bytes]) -> str | None:
    """The reason why there is no text in bytes that begin with a zero, if there is none: they are UTF-16, or zeros and
    blanks alone, as a crash or a full disk leaves them."""
    pieces = iter(pieces)
    first = next(pieces, b"")
    if is_utf16(first):
        return "utf16"
    return None if first.strip(ZEROS) or any(piece.strip(ZEROS) for piece in pieces) else "empty"


def is_utf16(data: bytes) -> bool:
    """Whether `data` begins with the mark of UTF-16 or UTF-32, or has a zero in each pair of bytes, as Latin has."""
    if data.startswith(UTF16_MARKS):
        return True
    if len(data) < 8 or b"\0" not in data[:2]:
        return False
    even, odd = data[:UTF16_BYTES:2], data[1:UTF16_BYTES:2]
    return (all(even) and not any(odd)) or (all(odd) and not any(even))


def iter_lines(path: str) -> Iterator[bytes]:
    """The lines of a text file, plain or compressed (`.gz`, `.zst`), as bytes with their line feeds. Raises `UserError`
    if it cannot be read, `IntegrityError` where a compressed one is damaged."""
    if packer_of(path):
        with open_stream(path) as stream:
            rest = b""
            while piece := stream.read(PIECE):
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line + b"\n" for line in lines)
            if rest:
                yield rest
    else:
        with reading(path), open_input(path) as file:
            yield from file
