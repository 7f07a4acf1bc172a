"""The lines of a labelled file as text: what `preprocess` reads it can read, and what it would count is refused here.

    1. `numbered_lines(path)`     (number from 1, the line with its end), plain or compressed, UTF-8

A byte order mark is dropped. Lines end with a line feed; in a file without any, with carriage returns. UTF-16, bytes
that are not UTF-8 and NUL bytes (what a crash leaves where the end of a file was) are a `UserError` with file and line.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.corpus import iter_lines
from megatron_encdec.text.heads import BYTE_ORDER_MARK, is_utf16


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Every line of the file at `path`, blank ones too; the last may lack its end."""
    for number, data in enumerate(_lines(str(path)), 1):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 (0x{data[error.start]:02x} at byte {error.start + 1} of the "
                            "line); save the file as UTF-8") from None
        if "\0" in text:
            raise UserError(f"{path}:{number}: a NUL byte; the file is damaged, or is UTF-16 (save it as UTF-8)")
        yield number, text


def _lines(path: str) -> Iterator[bytes]:
    first = True
    for data in iter_lines(path):
        if not first:
            yield data
            continue
        first = False
        if is_utf16(data):
            raise UserError(f"{path}:1: the file is UTF-16 or UTF-32; save it as UTF-8")
        data = data.removeprefix(BYTE_ORDER_MARK)
        if not data.endswith(b"\n") and b"\r" in data.rstrip(b"\r"):  # the only line: they end in carriage returns
            yield from (line + b"\r" for line in data.removesuffix(b"\r").split(b"\r"))
        elif data:
            yield data
