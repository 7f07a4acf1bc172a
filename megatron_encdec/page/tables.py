"""Tables: one description (`Table`, of `Column`s), written as `markdown`, as `csv_text` and, by page.py, as HTML.

Scores are fractions inside and per cent in every file. Markdown rounds to four decimals, HTML to two with four under
the pointer, CSV not at all; an interval is `mean ± half width` there and two columns in CSV. A dash: not known.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

DASH, DAGGER = "–", " †"
INTERVALS = {"interval": 100, "signed": 100, "interval number": 1, "signed number": 1}  # kind -> factor when shown


@dataclass(frozen=True)
class Interval:
    """`mean` of `count` values (0: others printed it), `half_width` of its interval (None: one value has no spread)."""

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    @property
    def percent(self) -> tuple[float, float]:
        """Mean and half width (0 where there is none) in per cent, as figures show them."""
        return 100 * self.mean, 100 * (self.half_width or 0.0)


@dataclass(frozen=True)
class Column:
    """A column; `group` stands above neighbours that share it. kind: text, count, percent, printed (per cent with two
    decimals), interval, signed (an interval of a difference), both in per cent, or as they are: interval number, signed
    number; rate, number."""

    name: str
    kind: str = "text"
    group: str = ""

    @property
    def full_name(self) -> str:
        """With its group, for files that have one line of names."""
        return f"{self.group} {self.name}".strip()


@dataclass
class Table:
    """`name` is its file's and `note` is Markdown; `best` are (row, column) places to set in bold, `incomplete` ones
    to mark with a dagger, `aside` rows to set in grey."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: list[Sequence[Any]]
    note: str = ""
    best: set[tuple[int, int]] = field(default_factory=set)
    incomplete: set[tuple[int, int]] = field(default_factory=set)
    aside: set[int] = field(default_factory=set)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Each group with the number of neighbouring columns under it; empty where no column has one."""
        names = [column.group for column in self.columns]
        return [(name, len(list(members))) for name, members in groupby(names)] if any(names) else []

    def cells(self, digits: int) -> list[list[str]]:
        """All values as people read them."""
        return [[text_of(value, column.kind, digits) + DAGGER * ((number, place) in self.incomplete)
                 for place, (value, column) in enumerate(zip(row, self.columns, strict=True))]
                for number, row in enumerate(self.rows)]


def text_of(value: Any, kind: str, digits: int) -> str:
    """A value as people read it."""
    if value is None:
        return DASH
    if factor := INTERVALS.get(kind):
        digits = digits if value.count else 2
        mean = f"{factor * value.mean:{'+' if kind.startswith('signed') else ''}.{digits}f}"
        return mean if value.half_width is None else f"{mean} ± {factor * value.half_width:.{digits}f}"
    if kind in ("percent", "printed"):
        return f"{100 * value:.{digits if kind == 'percent' else 2}f}"
    if kind == "rate":
        return rate_text(value)
    if kind == "number":
        return f"{value:.4g}"
    return f"{value:,}" if kind == "count" else str(value)


def rate_text(rate: float) -> str:
    """1e-05 -> `1e-5`; 0, of a model that was not trained further -> `none`."""
    if rate == 0:
        return "none"
    mantissa, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def as_markdown(text: str) -> str:
    """What others wrote, as Markdown that shows it unchanged."""
    return re.sub(r"([\\`*\[\]<>&]|\b_|_\b)", r"\\\1", text)


def markdown(table: Table) -> str:
    """The table under a heading."""
    return "\n".join([f"## {table.title}", "", *([table.note, ""] if table.note else []), markdown_rows(table, 4)])


def markdown_rows(table: Table, digits: int) -> str:
    """The table alone, best values bold."""
    rules = ("---" if column.kind == "text" else "---:" for column in table.columns)
    lines = [_markdown_row(column.full_name for column in table.columns), _markdown_row(rules)]
    for number, row in enumerate(table.cells(digits)):
        lines.append(_markdown_row(f"**{cell}**" if (number, place) in table.best else cell
                                   for place, cell in enumerate(row)))
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def csv_text(table: Table) -> str:
    """The table with full precision; scores in per cent."""
    header = []
    for column in table.columns:
        name = column.full_name.lower().replace(" ", "_")
        header += [name, f"{name}_half_width"] if column.kind in INTERVALS else [name]
    rows = [[part for value, column in zip(row, table.columns, strict=True) for part in _csv_parts(value, column.kind)]
            for row in table.rows]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def _csv_parts(value: Any, kind: str) -> Sequence[Any]:
    """A value's fields; the csv module writes None as nothing and a float with every digit."""
    if factor := INTERVALS.get(kind):
        mean, half_width = (value.mean, value.half_width) if value else (None, None)
        return [None if part is None else factor * part for part in (mean, half_width)]
    return [100 * value if kind in ("percent", "printed") and value is not None else value]
