"""Text in columns (CSV, TSV, CoNLL), strictly: as many rows come out as went in, or file and line are named.

    1. `read_csv(path, lines)`, `read_tsv(...)`     [(line where the record begins, {column: text})]
    2. `read_conll(path, lines)`                    [(line where the sentence begins, {"tokens": [...], "tags": [...]})]

The rules are those of docs/finetune.md. CSV is RFC 4180. In a TSV a quotation mark is a character like any other
(GLUE), but CSV writers write TSV too. So a TSV is read with quoting where only that gives every row the header's
columns, or changes no row. Where both ways fit and give other rows, and where the lines inside one quoted field look
like rows themselves, nobody can know: refused, except that lines which look like rows are rows in a TSV. pandas would
take all lines up to the next stray quotation mark as one field, without a word.

In CoNLL the first word's line says how columns are separated (by tabs if it has one, else by blanks) and how many there
are, so that no tag is taken from the wrong column. A comment stands before a sentence's first word, begins with `#`,
and is `# name = value` or does not end in a tag.
"""

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_encdec.platform.errors import UserError

ALIKE = 3  # lines under one pair of quotation marks from which on they are judged
_CAUSES = {"unexpected end": "a quotation mark opens here and is never closed (one inside a field is doubled and the "
                             "field quoted)",
           "expected after": "a field goes on after its closing quotation mark (one inside a field is doubled)"}
# A carriage return inside a line, which some writers do not quote and `csv` refuses; lines hold no NUL of their own.
_INSIDE = re.compile(r"\r(?=[^\r\n])")
_REST = r'[^"]*(?:""[^"]*)*"'  # of a quoted field
_WHERE_NEEDED = rf'(?:"[^"\t\r\n]*(?:""|[\t\r\n]){_REST}|[^"\t\n]*)'
_ANYWHERE = rf'(?:"{_REST}|[^"\t\n]*)'
_BY_NEED, _AT_WILL = (re.compile(rf"{field}(?:\t{field})*[\r\n]*") for field in (_WHERE_NEEDED, _ANYWHERE))
_ALL_QUOTED = re.compile(rf'"{_REST}(?:\t"{_REST})*[\r\n]*')

_BLANKS = re.compile(r"[ \t]+")  # and no other white space: a word may hold a no-break space
_COMMENT = re.compile(r"# ?\w+ = ")
_TAG = re.compile(r"O|[BI]-.+")


class Record(NamedTuple):
    """A row: the line where it begins, its fields, and its lines as they stand in the file."""

    line: int
    fields: list[str]
    source: list[str]


def read_csv(path: Path, lines: Iterable[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows after the header; blank lines are none. Raises `UserError` with file and line."""
    records = list(_quoted(path, list(lines), ","))
    _check_columns(path, records)
    if suspect := _rows_inside(records, ","):
        raise UserError(f"{path}:{suspect.line}: the quotation mark that opens here is closed in line "
                        f"{suspect.line + len(suspect.source) - 1}, and the lines between look like rows of their own; "
                        "double each quotation mark inside a field (a text that does hold such lines: write the set "
                        "as .jsonl)")
    return _under_header(path, records)


def read_tsv(path: Path, lines: Iterable[str]) -> list[tuple[int, dict[str, str]]]:
    """The same of a TSV."""
    return _under_header(path, _tsv_records(path, list(lines)))


def _under_header(path: Path, records: list[Record]) -> list[tuple[int, dict[str, str]]]:
    if not records:
        return []
    header, *rows = records
    if twice := next((name for name in header.fields if header.fields.count(name) > 1), None):
        raise UserError(f"{path}:{header.line}: two columns are called {twice!r}")
    return [(row.line, dict(zip(header.fields, row.fields, strict=True))) for row in rows]


def _tsv_records(path: Path, lines: list[str]) -> list[Record]:
    plain = [Record(number, line.rstrip("\r\n").split("\t"), [line]) for number, line in enumerate(lines, 1)
             if not _is_blank(line)]
    if not any('"' in line for line in lines):
        _check_columns(path, plain)
        return plain
    quoted = _as_a_writer_quotes(path, lines)
    if quoted is None or _uneven(quoted):
        _check_columns(path, plain, "; a quotation mark is a character here, since not every field that holds one is "
                                    "written as a CSV writer would: quoted, its marks doubled")
        return plain
    if _uneven(plain) or len(plain) == len(quoted):
        return quoted
    if _rows_inside(quoted, "\t"):
        return plain
    longest = max(quoted, key=lambda record: len(record.source))
    raise UserError(f"{path}:{longest.line}: the quotation mark that opens here may be a character, or hold lines "
                    f"{longest.line}-{longest.line + len(longest.source) - 1} together as one field; both give rows of "
                    "the right length. Write the set as .csv or .jsonl")


def _quoted(path: Path, lines: list[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a long text is cut at max_length, like any other
    reader = csv.reader((_INSIDE.sub("\0", line) for line in lines), delimiter=delimiter, strict=True)
    begin = 0
    try:
        for fields in reader:
            source, line, begin = lines[begin : reader.line_num], begin + 1, reader.line_num
            if not _is_blank("".join(source)):
                yield Record(line, [field.replace("\0", "\r") for field in fields], source)
    except csv.Error as error:
        cause = next((said for sign, said in _CAUSES.items() if sign in str(error)), str(error))
        raise UserError(f"{path}:{begin + 1}: {cause}") from None


def _as_a_writer_quotes(path: Path, lines: list[str]) -> list[Record] | None:
    """The rows read with quoting, or None where no CSV writer writes quotation marks like that: each field that holds a
    quotation mark, tab or line end is quoted, its marks doubled (where the header is quoted, others may be too)."""
    try:
        records = list(_quoted(path, lines, "\t"))
    except UserError:
        return None
    sources = ["".join(record.source) for record in records]
    written = _AT_WILL if _ALL_QUOTED.fullmatch(sources[0]) else _BY_NEED
    return records if all(map(written.fullmatch, sources)) else None


def _is_blank(line: str) -> bool:
    return not line.strip(" \r\n")  # a line of tabs is a row of empty fields


def _uneven(records: list[Record]) -> Record | None:
    """The first record that has not as many fields as the header."""
    return next((record for record in records if len(record.fields) != len(records[0].fields)), None)


def _check_columns(path: Path, records: list[Record], hint: str = "") -> None:
    if record := _uneven(records):
        count = len(record.fields)
        raise UserError(f"{path}:{record.line}: {count} column{'s' * (count != 1)}, but the header has "
                        f"{len(records[0].fields)}{hint}")


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


def is_tag(text: str) -> bool:
    """Whether `text` is a tag of the IOB kind: O, B-<type> or I-<type>."""
    return _TAG.fullmatch(text) is not None


def read_conll(path: Path, lines: Iterable[str]) -> list[tuple[int, dict[str, list[str]]]]:
    """The sentences. Raises `UserError` with file and line."""
    sentences: list[tuple[int, dict[str, list[str]]]] = []
    tabs, count, inside = False, 0, False
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        if not text.strip(" \t") or text.startswith("-DOCSTART-"):
            inside = False
            continue
        if not count:
            tabs = "\t" in text
        columns = [column.strip(" ") for column in text.split("\t")] if tabs else _BLANKS.split(text.strip(" \t"))
        if not inside and text.startswith("#") and (_COMMENT.match(text) or not is_tag(columns[-1])):
            continue
        _check_word(f"{path}:{number}", columns, count, tabs)
        if not inside:
            sentences.append((number, {"tokens": [], "tags": []}))
        count, inside = len(columns), True
        sentences[-1][1]["tokens"].append(columns[0])
        sentences[-1][1]["tags"].append(columns[-1])
    return sentences


def _check_word(where: str, columns: list[str], count: int, tabs: bool) -> None:
    if len(columns) < 2:
        raise UserError(f"{where}: one column, expected a word and a tag (separated by {'a tab' if tabs else 'blanks'}"
                        f"{', as in the lines above' if count else ''})")
    if count and len(columns) != count:
        raise UserError(f"{where}: {len(columns)} columns, but the lines above have {count} (separated by "
                        f"{'tabs' if tabs else 'blanks'})")
    if not columns[0]:
        raise UserError(f"{where}: no word in the first column")
    if not is_tag(columns[-1]):
        raise UserError(f"{where}: tag {columns[-1]!r} (the last column): expected O, B-<type> or I-<type>")
