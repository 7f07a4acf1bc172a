"""Progress of a command that can take minutes: one live line on a terminal, a plain line every few seconds
elsewhere.

    1. `Progress(label, total)`     `total` in any unit of work; shown as per cent and time left
    2. `update(done, detail)`       `detail` is what the caller wants beside it (MB/s, tokens/s)
"""

import sys
import time
from typing import Self

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Reports to standard error; a context manager. With `enabled=False` it says nothing."""

    def __init__(self, label: str, total: int, enabled: bool = True, done: int = 0):
        """`done` of `total` was finished earlier; a total of 0 is unknown."""
        self.label, self.total, self.enabled = label, total, enabled
        self._before = done
        self.started = self._last_line = time.monotonic()
        self._live = self._task = None
        if enabled and sys.stderr.isatty():
            self._live, self._task = _live_line(label, self.total or None)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def update(self, done: int, detail: str) -> None:
        """Show that `done` of `total` is finished."""
        if not self.enabled:
            return
        if self._live:
            self._live.update(self._task, completed=done, detail=detail)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            share = min(done / self.total, 1.0) if self.total else 0.0
            fresh = done - self._before
            left = (now - self.started) * max(self.total - done, 0) / fresh if self.total and fresh else float("inf")
            percent = f"{share:4.0%} · " if self.total else ""
            line = f"{self.label}: {percent}{detail} · {duration(left)} left"
            print(line, file=sys.stderr, flush=True)

    def elapsed(self) -> float:
        """Seconds since the start, never 0."""
        return max(time.monotonic() - self.started, 1e-9)


def _live_line(label: str, total: int):
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
               TextColumn("{task.fields[detail]}"), TimeRemainingColumn())
    live = RichProgress(*columns, console=Console(stderr=True))
    return live, live.add_task(label, total=total, detail="")


def duration(seconds: float) -> str:
    """`75.2` -> `1:15`; hours in front where there are any; `?` when unknown."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short_count(number: float) -> str:
    """`1234567` -> `1.23M`: three significant digits with k, M, G, T."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
