"""Progress of what can take minutes: live bars on a terminal, a plain line every few seconds elsewhere.

    1. `with Progress(label, total) as shown:`   `total` in any unit of work
    2. `shown.update(done, detail)`              `detail` is what stands beside it: a speed, a loss
    3. `shown.part(key, label, done, total)`     one of several things under way at once, with a bar of its own
    4. `shown.say(line)`                         a line that stays
    5. `sparkline(values)`                       a curve of one line of text
"""

import sys
import time
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import TextIO

SECONDS_BETWEEN_LINES = 5.0
ONE_LINE = 160  # columns of a terminal that has room for a bar with all that stands beside it


class Progress(AbstractContextManager):
    """A context manager; one that is not `active` (another rank's) is silent.
    total: in any unit of work, 0 where it is unknown. done: of `total`, finished earlier. counts: show `done/total`,
    not per cent. stream: standard error by default. seconds: between plain lines, SECONDS_BETWEEN_LINES by default."""

    def __init__(self, label: str, total: int, active: bool = True, done: int = 0, counts: bool = False,
                 stream: TextIO | None = None, seconds: float | None = None):
        self.label, self.total, self._active, self._counts, self._before = label, total, active, counts, done
        self._stream = stream or sys.stderr
        self._seconds = SECONDS_BETWEEN_LINES if seconds is None else seconds
        self._started = self._last_line = time.monotonic()
        self._bars, self._tasks = None, {}
        if active and self._stream.isatty():
            self._bars = _live_bars(self._stream)
            self._show(None, label, done, total, "", "")
            self._bars.start()

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bars:
            self._bars.stop()

    def update(self, done: int, detail: str, always: bool = False, left: str | None = None) -> None:
        """`done` of `total` is finished. detail: a speed, a loss. always: with a line now, however new the last is.
        left: the time that is left, in words, where the caller knows better than by `done` and the time so far."""
        if left is None:
            left = f"{self.time_left(done)} left" if self.total else ""
        if self._bars:
            self._show(None, self.label, done, self.total, detail, left)
        elif self._active and (always or self._line_is_due()):
            line = "  ".join(filter(None, (self._position(done, self.total), detail, left)))
            self.say(f"{self.label}{'' if self._counts else ':'} {line}")

    def part(self, key: Hashable, label: str, done: int = 0, total: int = 0) -> None:
        """`key` (one of several workers) has done so much of what `label` names; a `total` of 0 is not known yet."""
        if self._bars:
            self._show(key, label, done, total, "", "")
        elif total and self._active and self._line_is_due():
            self.say(f"  {label} {self._position(done, total)}")

    def part_ended(self, key: Hashable) -> None:
        """Nothing is under way for `key` any more."""
        if key in self._tasks:
            self._bars.remove_task(self._tasks.pop(key)[0])

    def say(self, line: str) -> None:
        self._last_line = time.monotonic()
        if self._bars:
            from rich.text import Text

            self._bars.console.print(Text(line), soft_wrap=True, highlight=False)
        elif self._active:
            print(line, file=self._stream, flush=True)

    def elapsed(self) -> float:
        """Seconds since the start, never 0."""
        return max(time.monotonic() - self._started, 1e-9)

    def time_left(self, done: int) -> str:
        """Once `done` of the total is finished, by the speed so far; `?` while nothing is."""
        fresh = done - self._before
        return duration(self.elapsed() * max(self.total - done, 0) / fresh) if self.total and fresh else "?"

    def _line_is_due(self) -> bool:
        return time.monotonic() - self._last_line >= self._seconds

    def _position(self, done: int, total: int) -> str:
        if not total:
            return ""
        return f"{done}/{total}" if self._counts else f"{min(done / total, 1.0):.0%}"

    def _show(self, key: Hashable, label: str, done: int, total: int, detail: str, left: str) -> None:
        """Draw the bar of `key`; None is the one of the whole. A new label is a new bar, with a clock of its own."""
        task, shown = self._tasks.get(key, (None, None))
        if label != shown:
            self.part_ended(key)
            task = self._bars.add_task(label, total=None, position="", detail="", left="")
            self._tasks[key] = task, label
        self._bars.update(task, completed=done, total=total or None, position=self._position(done, total),
                          detail=detail, left=left)


def _live_bars(stream: TextIO):
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    def text(name: str) -> TextColumn:
        return TextColumn(f"{{task.{name}}}", markup=False)  # names may hold brackets

    class OnTwoLines(RichProgress):
        """With the detail of each bar below it, where it may take more than one line."""

        def get_renderables(self):
            yield self.make_tasks_table(self.tasks)
            yield from (Text(task.fields["detail"]) for task in self.tasks if task.fields["detail"])

    console = Console(file=stream)
    columns = [text("description"), BarColumn(bar_width=24), text("fields[position]"), TimeElapsedColumn(),
               text("fields[left]")]
    if console.width < ONE_LINE:
        return OnTwoLines(*columns, console=console)
    return RichProgress(*columns[:3], text("fields[detail]"), *columns[3:], console=console)


def duration(seconds: float) -> str:
    """`75.2` -> `1:15`; hours in front where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int = 24, blocks: str = "▁▂▃▄▅▆▇█") -> str:
    """`values` as at most `width` blocks from the lowest to the highest of them; each is the mean of its share."""
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)] if count else [0]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in zip(edges, edges[1:], strict=False)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    steps = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * steps)] for mean in means)


def short_count(number: float) -> str:
    """`1234567` -> `1.23M`: three significant digits with k, M, G, T."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
