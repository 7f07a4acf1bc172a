"""CSV and TSV, strictly: as many rows come out as went in, or the file and line are named.

    1. `read_delimited(path, delimiter)`     [(line, {column: text})], the line where the record begins

CSV is RFC 4180: a field in quotation marks may hold commas and line ends, and a quotation mark inside is doubled. In a
TSV of GLUE's kind a quotation mark is a character like any other. But CSV writers write TSV too, so a file is read with
quoting where that is the only way for every row to have the header's columns, or changes no row: each field that holds
a quotation mark, tab or line end is quoted, its marks doubled (or the header is quoted: a writer that quotes all).
Where both ways fit and give other rows, and where the lines inside one quoted field look like rows themselves, nobody
can know: refused, except that lines which look like rows are rows in a TSV.
"""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_encdec.finetune.lines import numbered_lines
from megatron_encdec.platform.errors import UserError

ALIKE = 3  # lines under one pair of quotation marks from which on they are judged
_CAUSES = {"unexpected end": "a quotation mark opens here and is never closed (one inside a field is doubled and the "
                             "field quoted)",
           "expected after": "a field goes on behind its closing quotation mark (one inside a field is doubled)"}
# A carriage return inside a line, which some writers do not quote and `csv` refuses; lines hold no NUL of their own.
_INSIDE = re.compile(r"\r(?=[^\r\n])")


class Record(NamedTuple):
    """A row's fields, the line where it begins, and its lines as they stand in the file."""

    line: int
    fields: list[str]
    source: list[str]


def read_delimited(path: Path, delimiter: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of the file at `path` behind its header; blank lines are none. Raises `UserError` with file and line."""
    lines = [line for _, line in numbered_lines(path)]
    if delimiter == "\t":
        records = _read_tsv(path, lines)
    else:
        records = list(_quoted(path, lines, delimiter))
        _check_columns(path, records)
        if suspect := _rows_inside(records, delimiter):
            raise UserError(f"{path}:{suspect.line}: the quotation mark that opens here is closed in line "
                            f"{suspect.line + len(suspect.source) - 1}, and the lines between look like rows of their "
                            "own; double each quotation mark inside a field (a text that does hold such lines: "
                            "write the set as .jsonl)")
    if not records:
        return []
    header, *rows = records
    if twice := next((name for name in header.fields if header.fields.count(name) > 1), None):
        raise UserError(f"{path}:{header.line}: two columns are called {twice!r}")
    return [(row.line, dict(zip(header.fields, row.fields, strict=True))) for row in rows]


def _quoted(path: Path, lines: list[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a long text is cut at max_length, like any other
    held = (_INSIDE.sub("\0", line) for line in lines)
    reader, begin = csv.reader(held, delimiter=delimiter, strict=True), 0
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            cause = next((said for sign, said in _CAUSES.items() if sign in str(error)), str(error))
            raise UserError(f"{path}:{begin + 1}: {cause}") from None
        if fields is None:
            return
        source, line = lines[begin : reader.line_num], begin + 1
        begin = reader.line_num
        if not _is_blank("".join(source)):
            yield Record(line, [field.replace("\0", "\r") for field in fields], source)


def _is_blank(line: str) -> bool:
    return not line.strip(" \r\n")  # a line of tabs is a row of empty fields


def _plain(lines: list[str]) -> list[Record]:
    """Each line a row, a quotation mark a character."""
    return [Record(number, line.rstrip("\r\n").split("\t"), [line]) for number, line in enumerate(lines, 1)
            if not _is_blank(line)]


def _check_columns(path: Path, records: list[Record], hint: str = "") -> None:
    for record in records:
        if len(record.fields) != len(records[0].fields):
            raise UserError(f"{path}:{record.line}: {_columns(len(record.fields))}, but the header has "
                            f"{len(records[0].fields)}{hint}")


def _columns(count: int) -> str:
    return f"{count} column{'s' * (count != 1)}"


def _read_tsv(path: Path, lines: list[str]) -> list[Record]:
    plain = _plain(lines)
    if not any('"' in line for line in lines):
        _check_columns(path, plain)
        return plain
    quoted = _as_a_writer_quotes(path, lines)
    if quoted is None or not _even(quoted):
        _check_columns(path, plain, "; a quotation mark is a character here, since not every field that holds one is "
                                    "written as a CSV writer would: quoted, its marks doubled")
        return plain
    if not _even(plain) or len(plain) == len(quoted):
        return quoted
    if _rows_inside(quoted, "\t"):
        return plain
    longest = max(quoted, key=lambda record: len(record.source))
    raise UserError(f"{path}:{longest.line}: the quotation mark that opens here may be a character, or hold lines "
                    f"{longest.line}-{longest.line + len(longest.source) - 1} together as one field; both give rows of "
                    "the right length. Write the set as .csv or .jsonl")


def _even(records: list[Record]) -> bool:
    return all(len(record.fields) == len(records[0].fields) for record in records)


_REST = r'[^"]*(?:""[^"]*)*"'  # of a quoted field
_WHERE_NEEDED = rf'(?:"[^"\t\r\n]*(?:""|[\t\r\n]){_REST}|[^"\t\n]*)'
_ANYWHERE = rf'(?:"{_REST}|[^"\t\n]*)'
_BY_NEED, _AT_WILL = (re.compile(rf"{field}(?:\t{field})*[\r\n]*") for field in (_WHERE_NEEDED, _ANYWHERE))
_ALL_QUOTED = re.compile(rf'"{_REST}(?:\t"{_REST})*[\r\n]*')


def _as_a_writer_quotes(path: Path, lines: list[str]) -> list[Record] | None:
    """The rows read with quoting, or None where no CSV writer writes quotation marks like that."""
    try:
        records = list(_quoted(path, lines, "\t"))
    except UserError:
        return None
    sources = ["".join(record.source) for record in records]
    written = _AT_WILL if _ALL_QUOTED.fullmatch(sources[0]) else _BY_NEED
    return records if all(map(written.fullmatch, sources)) else None


def _rows_inside(records: list[Record], delimiter: str) -> Record | None:
    """The first record over `ALIKE` lines or more each of which could be a row: it has the header's number of columns,
    and all have in one column what that column holds in ordinary rows."""
    count = len(records[0].fields) if records else 0
    suspects = [record for record in records if len(record.source) >= ALIKE and count > 1]
    if not suspects:
        return None
    known = [{record.fields[place] for record in records[1:] if len(record.source) == 1} for place in range(count)]
    for record in suspects:
        lines = [line.rstrip("\r\n").split(delimiter) for line in record.source]
        if all(len(fields) == count for fields in lines) and any(
                all(fields[place] in known[place] for fields in lines) for place in range(count)):
            return record
    return None
