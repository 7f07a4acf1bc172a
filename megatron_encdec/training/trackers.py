"""Trackers (TensorBoard, wandb, MLflow, trackio) beside a run: a process each, which training never waits for.

    1. `Trackers(names, ...)`      on the rank that speaks: starts a process a tracker (tracker_process.py)
    2. `log(step, tokens, ...)`    a line into each one's pipe, if there is room; if not it is dropped, and counted
    3. `close(patience)`           the pipes end; who has not written all within `patience` seconds is ended

A process, not a thread: what a tracker imports, raises, installs as a signal or exit handler, or waits for is its own.
A pipe that is full takes nothing, at once; on the other side up to QUEUED points wait for a tracker that is slow.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_encdec.platform.children import start_python
from megatron_encdec.platform.watchdog import LONG, mark

FOLDER = "trackers"  # of the run directory: what each tracker says, and by which id it knows the run
PATIENCE = 60.0  # seconds that the end of a run waits for its last points to be written
HURRY = 3.0  # the same where a signal or a time limit ended it


class Tracker:
    """The process of the tracker `name`, and the pipes to and from it. directory: of the run, which goes on after
    `step`."""

    def __init__(self, name: str, directory: Path, step: int):
        self.name, self.dropped, self.sent, self.ended = name, 0, 0, False
        folder = directory / FOLDER
        folder.mkdir(exist_ok=True)
        points_out, self._points = os.pipe()
        self._said, said_in = os.pipe()
        os.set_blocking(self._points, False)
        os.set_blocking(self._said, False)
        self._rest = b""
        arguments = (name, points_out, said_in, str(directory.resolve()), step)
        try:
            with open(folder / f"{name}.log", "ab") as log:
                self._process = start_python(f"training.tracker_process import main; main{arguments!r}",
                                             [points_out, said_in], {}, stdout=log, stderr=log, start_new_session=True)
        except OSError:
            os.close(self._points)
            os.close(self._said)
            raise
        finally:
            os.close(points_out)
            os.close(said_in)

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Give it the `values` of a step, or count them as dropped. Takes microseconds."""
        if self.ended:
            return
        try:
            for line in _lines(step, tokens, list(values.items())):
                os.write(self._points, line)
            self.sent += 1
        except BlockingIOError:
            self.dropped += 1
        except OSError:  # it has ended
            self.ended = True

    def said(self) -> list[str]:
        """What it has to say to people since the last call."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._said, 4096):
                self._rest += piece
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]

    def finish(self) -> None:
        """No more points: it writes what waits and ends."""
        os.close(self._points)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most `seconds`; if not it is ended now."""
        try:
            self._process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            return False

    def close(self) -> None:
        """Nothing more is read of it."""
        os.close(self._said)


class Trackers:
    """Those of a run. names: as in `logging.trackers`. say: prints a line for people."""

    def __init__(self, names: Sequence[str], directory: Path, step: int, say: Callable[[str], None]):
        self._all: list[Tracker] = []
        self._say, self._told = say, set()
        for name in names:
            try:
                self._all.append(Tracker(name, directory, step))
            except OSError as error:
                say(f"tracker {name}: cannot start ({error.strerror}); training goes on without it")

    def __bool__(self):
        return bool(self._all)

    def log(self, step: int, tokens: int, values: Mapping[str, float | None]) -> None:
        """The values of a step, those that are None left out, for every tracker."""
        found = {name: float(value) for name, value in values.items() if value is not None}
        for tracker in self._all if found else ():
            tracker.log(step, tokens, found)
            self._tell(tracker)

    def close(self, patience: float = PATIENCE) -> None:
        """End them; they have `patience` seconds in all."""
        for tracker in self._all:
            tracker.finish()
        if self._all:
            mark("waiting for the trackers to write their last points", limit=LONG)
        limit = time.monotonic() + patience
        for tracker in self._all:
            in_time = tracker.wait(max(0.0, limit - time.monotonic()))
            self._tell(tracker)
            if not in_time:
                self._say(f"tracker {tracker.name}: had not written everything {patience:.0f} s after the last step, "
                          "and was ended; metrics.jsonl has it all")
            tracker.close()
            if tracker.dropped:
                self._say(f"tracker {tracker.name}: {tracker.dropped:,} of {tracker.dropped + tracker.sent:,} points "
                          "were dropped; metrics.jsonl has them")
        self._all = []

    def _tell(self, tracker: Tracker) -> None:
        for line in tracker.said():
            self._say(f"tracker {tracker.name}: {line}")
        if tracker.dropped and tracker.name not in self._told:
            self._told.add(tracker.name)
            self._say(f"tracker {tracker.name}: takes points more slowly than they come; some are dropped, training "
                      "does not wait")


def _lines(step: int, tokens: int, values: list[tuple[str, float]]) -> list[bytes]:
    """The values as JSON lines, each so short that a pipe takes it whole or not at all."""
    line = json.dumps([step, tokens, dict(values)]).encode() + b"\n"
    if len(line) <= select.PIPE_BUF or len(values) == 1:
        return [line]
    half = len(values) // 2
    return _lines(step, tokens, values[:half]) + _lines(step, tokens, values[half:])
