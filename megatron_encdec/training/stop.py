"""Ending before the last step: a signal, a time limit, a launcher that is gone. All ranks stop after the same step.

    1. `seconds_of(text)`       90s, 3h30m, 02:30:00, 1-12:00:00 -> seconds
    2. `TimeLimit`              whether another step and a save still fit
    3. `Stopper.agree()`        after every step: the ranks' reasons, the most pressing one for all
"""

import re
import signal
import time

from megatron_encdec.platform.control import Control
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.launcher import is_orphan
from megatron_encdec.platform.signals import StopSignals

_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
_END_SECONDS = 5.0  # for what comes after the last save: closing files, leaving the groups
_GUESSED_BYTES_PER_SECOND = 100e6  # of a rank's disk, before the first save has been timed

_TIME, _ORPHAN, _SIGNAL = 1, 2, 100  # a signal is _SIGNAL + its number


def seconds_of(text: str) -> float:
    """Seconds of `90s`, `45m`, `3h30m`, `1d2h`, `HH:MM:SS` or Slurm's `D-HH:MM:SS`."""
    match = _CLOCK.fullmatch(text) or (_UNITS.fullmatch(text) if text else None)
    if match is None:
        raise UserError(f"--time-limit {text}: write it like 90s, 45m, 3h30m, 02:30:00 or 1-12:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--time-limit {text}: leaves no time at all")
    return float(total)


class TimeLimit:
    """`seconds` from `started` (time.time()), of which the last ones are kept for saving.

    bytes_to_save: of this rank, for the first guess.
    """

    def __init__(self, seconds: float, started: float, bytes_to_save: int):
        self._end = time.monotonic() + seconds - (time.time() - started)
        self._save = bytes_to_save / _GUESSED_BYTES_PER_SECOND
        self._last_step: float | None = None
        self._steps: list[float] = []

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self._save = max(self._save, seconds)

    def is_near(self) -> bool:
        """After a step: whether another one and a save would not be done by the end. The slowest of the last
        steps, whatever it also did, is taken, and half as much again for safety."""
        now = time.monotonic()
        if self._last_step is not None:
            self._steps = [*self._steps[-19:], now - self._last_step]
        self._last_step = now
        needed = 1.5 * (max(self._steps, default=0.0) + self._save) + _END_SECONDS
        return now + needed > self._end


class Stopper:
    """Why this run ends before its last step, if it does; `reason` is a line for people, the same on all ranks."""

    def __init__(self, control: Control, signals: StopSignals | None, limit: TimeLimit | None):
        self._control, self._signals, self._limit = control, signals, limit
        self.reason: str | None = None

    def agree(self, may_time_out: bool = True) -> None:
        """Set `reason` on all ranks where any of them has one; collective."""
        code = self._control.highest(self._mine(may_time_out))
        if code >= _SIGNAL:
            self.reason = f"stopped by {signal.Signals(code - _SIGNAL).name}"
        elif code:
            self.reason = "stopped: the launcher is gone" if code == _ORPHAN else "stopped before the time limit"

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        if self._limit:
            self._limit.saved(seconds)

    def _mine(self, may_time_out: bool) -> int:
        if self._signals is not None and self._signals.received:
            return _SIGNAL + self._signals.received
        if is_orphan():
            return _ORPHAN
        return _TIME if self._limit and may_time_out and self._limit.is_near() else 0
