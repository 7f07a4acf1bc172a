"""What a person sees while training: a live line on a terminal, plain lines otherwise; TensorBoard beside it."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_encdec.platform.optional import why_unusable

PLAIN_SECONDS = 5.0  # between plain lines


class TrainingProgress:
    """Loss, tokens/s and the time left; silent on every rank but the one that reports."""

    def __init__(self, total_steps: int, done_steps: int, active: bool):
        self._active, self._total, self._done = active, total_steps, done_steps
        self._live = active and sys.stdout.isatty()
        self._console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self._start = self._last_line = time.monotonic()
        self._first = done_steps
        self._bar = None
        if self._live:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=self._console)
            self._task = self._bar.add_task("start", total=total_steps, completed=done_steps, status="")
            self._bar.start()

    def step(self, step: int, phase: str, status: str) -> None:
        """A step is done; `status` is its loss and speed."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=phase, status=status)
            return
        now = time.monotonic()
        if self._active and (now - self._last_line >= PLAIN_SECONDS or step == self._total):
            self._last_line = now
            left = (now - self._start) / max(1, step - self._first) * (self._total - step)
            self.say(f"step {step}/{self._total}  {phase}  {status}  {_clock(left)} left")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._active:
            self._console.print(line, markup=False)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class TensorBoard:
    """Scalars for TensorBoard, or nothing where the package is missing or broken."""

    def __init__(self, directory: Path, active: bool):
        self._writer = None
        if active and why_unusable("torch.utils.tensorboard") is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory))

    def write(self, step: int, **scalars: float) -> None:
        """Add each scalar that is not None at `step`."""
        for name, value in scalars.items():
            if self._writer is not None and value is not None:
                try:
                    self._writer.add_scalar(name.replace("__", "/"), value, step)
                except (OSError, RuntimeError):  # a full disk: metrics.jsonl holds the same numbers
                    self._writer = None

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
