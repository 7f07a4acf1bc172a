"""Ending before the last step: a signal, a time limit, a launcher that is gone, a run directory that another launch has
taken over. All ranks stop after the same step."""

import math
import re
import signal
import time
from collections import deque

from megatron_encdec.platform.device import device_type
from megatron_encdec.platform.distributed import Control
from megatron_encdec.platform.errors import RunFailed, UserError
from megatron_encdec.platform.launcher import is_orphan
from megatron_encdec.platform.signals import StopSignals
from megatron_encdec.rundir.lock import Claim

_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
_END_SECONDS = 5.0  # for what comes after the last save: closing files, leaving the groups
_GUESSED_BYTES_PER_SECOND = 100e6  # of a rank's disk, before the first save has been timed

_TIME, _ORPHAN, _SIGNAL, _LOST = 1, 2, 100, 1000  # a signal is _SIGNAL + its number


def seconds_of(text: str | None) -> float | None:
    """Seconds of `90s`, `45m`, `3h30m`, `1d2h`, `HH:MM:SS` or Slurm's `D-HH:MM:SS`; None of None."""
    if text is None:
        return None
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
    bytes_to_save: of this rank, for the first guess."""

    def __init__(self, seconds: float, started: float, bytes_to_save: int):
        self._end = time.monotonic() + seconds - (time.time() - started)
        self._save = bytes_to_save / _GUESSED_BYTES_PER_SECOND

    def saved(self, seconds: float) -> None:
        self._save = max(self._save, seconds)

    def is_near(self, step_seconds: float) -> bool:
        """Whether another step and a save would not be done by the end. The slowest of the last steps, whatever it
        also did, is taken, and half as much again for safety."""
        return time.monotonic() + 1.5 * (step_seconds + self._save) + _END_SECONDS > self._end


class Stopper:
    """Why this run ends before its last step, if it does; `reason` is a line for people, the same on all ranks.
    seconds: how long the ranks go on without asking each other, where a step is shorter: 0 on a CPU. On a GPU they
    would wait for the device after every step; a second still leaves a signal's grace time to the save. claim: on the
    run directory, given to the one rank that looks whether it still holds."""

    def __init__(self, control: Control, signals: StopSignals | None, limit: TimeLimit | None,
                 seconds: float | None = None, claim: Claim | None = None):
        self._control, self._signals, self._limit, self._claim = control, signals, limit, claim
        self._seconds = (1.0 if device_type() == "cuda" else 0.0) if seconds is None else seconds
        self._last_step = time.monotonic()
        self._slowest: deque[float] = deque([0.0], maxlen=20)  # seconds of the last steps
        self._steps_left = 1  # until the ranks ask each other again; the same on all of them
        self.reason: str | None = None

    def agree(self) -> None:
        """After a step: set `reason`, the most pressing one of any rank, on all of them; collective. Raises `RunFailed`
        where the run directory is another launch's now."""
        now = time.monotonic()
        self._slowest.append(now - self._last_step)
        self._last_step = now
        self._steps_left -= 1
        if self._steps_left:
            return
        self.agree_now(self._limit is not None and self._limit.is_near(max(self._seconds, *self._slowest)))
        self._steps_left = 1
        if self._seconds:
            milliseconds = self._control.highest(math.ceil(1000 * max(self._slowest)))
            self._steps_left = max(1, int(1000 * self._seconds / max(1, milliseconds)))

    def agree_now(self, out_of_time: bool = False) -> None:
        """The same, whatever the steps."""
        self._last_step = time.monotonic()
        code = self._agreed(out_of_time)
        if code >= _SIGNAL:
            self.reason = f"stopped by {signal.Signals(code - _SIGNAL).name}"
        elif code:
            self.reason = "stopped: the launcher is gone" if code == _ORPHAN else "stopped before the time limit"

    def check_claim(self) -> None:
        """Raises `RunFailed` on all ranks where the run directory is another launch's now; collective."""
        self._agreed()

    def saved(self, seconds: float) -> None:
        if self._limit:
            self._limit.saved(seconds)

    def _agreed(self, out_of_time: bool = False) -> int:
        code = self._control.highest(self._mine(out_of_time))
        if code == _LOST:
            why = self._claim.lost() if self._claim else "the run directory is another launch's"
            raise RunFailed(f"{why}; this launch held it before, and stops without writing more")
        return code

    def _mine(self, out_of_time: bool) -> int:
        if self._claim is not None and self._claim.lost():
            return _LOST
        if self._signals is not None and self._signals.received:
            return _SIGNAL + self._signals.received
        if is_orphan():
            return _ORPHAN
        return _TIME if out_of_time else 0
