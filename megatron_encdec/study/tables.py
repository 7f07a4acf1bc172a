"""Tables: one description, written as Markdown, CSV and HTML.

Scores are fractions inside and per cent in every file. Markdown rounds to four decimals, HTML to two with four under
the pointer, CSV not at all; an interval is `mean ± half width` there and two columns in CSV. A dash: not known.

    1. `Column(name, kind)`       text, count, percent, printed (per cent with the paper's two decimals), interval,
                                  signed (an interval of a difference), rate
    2. `Table(...)`               rows of raw values
    3. `markdown`, `csv_text`, `html`
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from megatron_encdec.study.statistics import Interval

DASH, DAGGER = "–", " †"
LONG = 60  # characters of a cell that is folded into lines


@dataclass(frozen=True)
class Column:
    """A column; `group` stands above neighbours that share it."""

    name: str
    kind: str = "text"
    group: str = ""

    @property
    def is_number(self) -> bool:
        """Whether it is set flush right."""
        return self.kind != "text"


@dataclass
class Table:
    """`name` is its file's; `best` are (row, column) places to set in bold, `incomplete` ones to mark with a
    dagger, `aside` rows to set in grey."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: list[Sequence[Any]]
    note: str = ""
    best: set[tuple[int, int]] = field(default_factory=set)
    incomplete: set[tuple[int, int]] = field(default_factory=set)
    aside: set[int] = field(default_factory=set)


def text_of(value: Any, kind: str, digits: int) -> str:
    """A value as people read it."""
    if value is None:
        return DASH
    if kind in ("interval", "signed"):
        digits = digits if value.count else 2  # of no runs here: a printed number
        mean = f"{100 * value.mean:{'+' if kind == 'signed' else ''}.{digits}f}"
        return mean if value.half_width is None else f"{mean} ± {100 * value.half_width:.{digits}f}"
    return {"printed": lambda: f"{100 * value:.2f}", "percent": lambda: f"{100 * value:.{digits}f}",
            "rate": lambda: rate_text(value), "count": lambda: f"{value:,}", "text": lambda: str(value)}[kind]()


def rate_text(rate: float) -> str:
    """1e-05 -> `1e-5`."""
    mantissa, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def markdown(table: Table) -> str:
    """The table under a heading, best values bold."""
    names = [f"{column.group} {column.name}".strip() for column in table.columns]
    lines = [f"## {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    lines += [_markdown_row(names), _markdown_row("---:" if column.is_number else "---" for column in table.columns)]
    for number, row in enumerate(table.rows):
        cells = [text_of(value, column.kind, 4) + DAGGER * ((number, place) in table.incomplete)
                 for place, (value, column) in enumerate(zip(row, table.columns, strict=True))]
        lines.append(_markdown_row(f"**{cell}**" if (number, place) in table.best else cell
                                   for place, cell in enumerate(cells)))
    return "\n".join(lines) + "\n"


def _markdown_row(cells) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def csv_text(table: Table) -> str:
    """The table with full precision; scores in per cent."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = []
    for column in table.columns:
        name = f"{column.group} {column.name}".strip().lower().replace(" ", "_")
        header += [name, f"{name}_half_width"] if column.kind in ("interval", "signed") else [name]
    writer.writerow(header)
    for row in table.rows:
        cells: list[Any] = []
        for value, column in zip(row, table.columns, strict=True):
            cells += _raw(value, column.kind)
        writer.writerow(cells)
    return buffer.getvalue()


def _raw(value: Any, kind: str) -> list[Any]:
    if kind in ("interval", "signed"):
        if value is None:
            return ["", ""]
        return [repr(100 * value.mean), "" if value.half_width is None else repr(100 * value.half_width)]
    if value is None:
        return [""]
    return [repr(100 * value)] if kind in ("percent", "printed") else [repr(value)] if kind == "rate" else [value]


def html(table: Table) -> str:
    """A <table> that scrolls inside its box."""
    body = []
    for number, row in enumerate(table.rows):
        cells = "".join(_html_cell(value, column, (number, place) in table.best, (number, place) in table.incomplete)
                        for place, (value, column) in enumerate(zip(row, table.columns, strict=True)))
        kind = ' class="aside"' if number in table.aside else ""
        body.append(f"<tr{kind}>{cells}</tr>")
    return (f'<div class="scroll"><table><thead>{_html_head(table.columns)}</thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>")


def _html_head(columns: Sequence[Column]) -> str:
    names = "".join(f'<th class="{"n" if column.is_number else "t"}">{escape(column.name)}</th>' for column in columns)
    if not any(column.group for column in columns):
        return f"<tr>{names}</tr>"
    groups, place = [], 0
    while place < len(columns):
        group, width = columns[place].group, 1
        while place + width < len(columns) and columns[place + width].group == group:
            width += 1
        groups.append(f'<th class="{"g" if group else "e"}" colspan="{width}">{escape(group)}</th>')
        place += width
    return f"<tr>{''.join(groups)}</tr><tr>{names}</tr>"


def _html_cell(value: Any, column: Column, best: bool, is_incomplete: bool) -> str:
    shown = text_of(value, column.kind, 2)
    if isinstance(value, Interval) and value.half_width is not None:
        mean, _, half = shown.partition(" ± ")
        shown = f"{mean}<small> ± {half}</small>"
    else:
        shown = escape(shown)
    kind = "n" if column.is_number else "t long" if len(shown) > LONG else "t"
    title = f' title="{escape(text_of(value, column.kind, 4))}"' if isinstance(value, Interval) else ""
    return f'<td class="{kind}{" best" if best else ""}"{title}>{shown}{DAGGER * is_incomplete}</td>'
