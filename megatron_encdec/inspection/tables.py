"""How `inspect` prints: tables and facts, on a terminal as in a log (plain text of 100 columns there)."""

import sys
from collections.abc import Sequence

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 100


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """As `table_text` has it."""
    say(table_text(title, columns, rows, left))


def table_text(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table of strings; the first `left` columns are names and may be folded, the others are numbers."""
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    for position, column in enumerate(columns):
        justify = "left" if position < left else "right"
        table.add_column(Text(column), justify=justify, overflow="fold", no_wrap=position >= left)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    with console.capture() as captured:
        console.print(table)
    return "\n".join([title, *(line.rstrip() for line in captured.get().splitlines())])


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """As `facts_text` has them."""
    if facts:
        say(facts_text(facts))


def facts_text(facts: Sequence[tuple[str, str]]) -> str:
    """Lines of `name   value`, never wrapped, so that a path can be copied."""
    width = max((len(name) for name, _ in facts), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in facts)


def say(text: str) -> None:
    """Print; a character that the terminal's encoding lacks is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def number(value: float | int | None, digits: int = 4) -> str:
    """1,234 or 5.6789; a dash for what is not known."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """A count: exact below ten million, then with three decimals of M, B or T."""
    if value is None:
        return "-"
    if value < 10_000_000:
        return f"{value:,.0f}"
    value, unit = _scaled(value / 1e6, 1000, "MBT")
    return f"{value:,.3f}{unit}"


def size(count: int) -> str:
    """Bytes, in the unit that reads best."""
    value, unit = _scaled(count, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))
    return f"{value} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def _scaled(value: float, base: int, units: Sequence[str]) -> tuple[float, str]:
    power = 0
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return value, units[power]
