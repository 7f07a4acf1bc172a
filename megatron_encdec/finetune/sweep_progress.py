"""What a person sees of a sweep: a live table on a terminal, a plain line for each run elsewhere.

    1. `with SweepProgress(total, finished, failed) as shown:`     counts of runs before this launch
    2. `begun`, `step`, `ended`                                    what workers tell
    3. `say(line)`                                                 a line that stays
"""

import sys
import time
from pathlib import Path
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_encdec.text.progress import duration

REFRESH = 4  # times a second
SECONDS_BETWEEN_LINES = 30.0  # plain lines of long runs


class SweepProgress:
    """Counts runs and shows them; a context manager."""

    def __init__(self, total: int, finished: int, failed: int):
        self.total, self.finished, self.failed = total, finished, failed
        self._before = finished + failed
        self._started = self._last_line = time.monotonic()
        self._workers: dict[int, dict] = {}
        self._console = Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, refresh_per_second=REFRESH, get_renderable=self._render) \
            if sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._workers.clear()
        if self._live:
            self._live.stop()

    def begun(self, slot: int, directory: Path) -> None:
        """The worker in `slot` has begun a run."""
        self._workers[slot] = {"run": name_of(directory), "began": time.monotonic(), "step": None}

    def step(self, slot: int, step: int, total: int) -> None:
        """The run in `slot` has done `step` of `total` steps."""
        shown = self._workers.get(slot)
        if shown is None:
            return
        shown["step"] = (step, total)
        now = time.monotonic()
        if self._live is None and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"  {shown['run']}: step {step} of {total}")

    def ended(self, slot: int | None, directory: Path, outcome: str, is_failure: bool) -> None:
        """A run is over; `outcome` are its scores, or why it failed. `slot` is None for another sweep's."""
        shown = self._workers.pop(slot, None)
        self.failed += is_failure
        self.finished += not is_failure
        took = f"  {duration(time.monotonic() - shown['began'])}" if shown else ""
        self._last_line = time.monotonic()
        done = self.finished + self.failed
        self.say(f"{done}/{self.total}  {name_of(directory)}  {outcome}{took}{self._left_text()}")

    def idle(self, slot: int) -> None:
        """The worker in `slot` has nothing to do."""
        self._workers.pop(slot, None)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(Text(line))
        sys.stdout.flush()

    @property
    def seconds_left(self) -> float:
        """By the runs of this launch so far; infinite before the first has ended."""
        fresh = self.finished + self.failed - self._before
        left = self.total - self.finished - self.failed
        return (time.monotonic() - self._started) / fresh * left if fresh else float("inf")

    def _left_text(self) -> str:
        return f"  {duration(self.seconds_left)} left" if self.finished + self.failed < self.total else ""

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, expand=True)
        for column, kind in (("worker", "right"), ("run", "left"), ("step", "right"), ("", "left"), ("time", "right")):
            table.add_column(column, justify=kind, no_wrap=True, ratio=1 if column == "" else None, style="dim")
        for slot, shown in sorted(self._workers.items()):
            step, total = shown["step"] or (0, 0)
            table.add_row(str(slot), Text(shown["run"]), f"{step}/{total}" if total else "preparing",
                          ProgressBar(total=total or 1, completed=step), duration(time.monotonic() - shown["began"]))
        done = self.finished + self.failed
        failed = f", {self.failed} failed" if self.failed else ""
        line = Text(f"{done} of {self.total} runs done{failed}; {duration(self.seconds_left)} left")
        return Group(table, ProgressBar(total=self.total or 1, completed=done), line)


def name_of(directory: Path) -> str:
    """`model/SC/dataset/lr1e-05_sd0` of a run's folder."""
    return "/".join(directory.parts[-4:])
