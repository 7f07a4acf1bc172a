"""A worker of a sweep: one process that does run after run, so that what one has loaded serves the next.

It is told `(function, cell)` through a pipe and answers with what happened; results and failures are written here,
under the lock of the run's folder. What ends it:

    the pipe closes          the sweep is done, or was killed: end at once, also in the middle of a run
    SIGTERM                  end the run in hand without results (it is repeated later), then end
    anything else            the sweep sees the pipe close, and starts another worker

    1. `main()`     python -m megatron_encdec.finetune.sweep_worker DESCRIPTOR
"""

import contextlib
import importlib
import inspect
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_encdec.finetune.results_tree import FINISHED, claim, state_of, write_failure, write_results
from megatron_encdec.platform.errors import RunFailed, UserError

LOG = "log.txt"  # in the run's folder: what the run printed
SECONDS_BETWEEN_STEPS = 0.2  # between messages of progress


class Stopped(BaseException):
    """SIGTERM came in the middle of a run. No `Exception`: no handler in a library may take it for a failure."""


def main() -> None:
    """Answer cells until the pipe closes."""
    connection = Connection(int(sys.argv[1]))
    cells: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, cells), daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)
    try:
        while True:
            name, cell = cells.get()
            connection.send(_answer(name, cell, _Reporter(connection)))
    except (Stopped, OSError):
        os._exit(0)  # not through libraries' exit handlers, which may wait for threads


def _listen(connection: Connection, cells: queue.SimpleQueue) -> None:
    try:
        while True:
            cells.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)  # nobody would take the answer
    except BaseException:  # a cell that this process cannot read: the sweep sees its worker end
        traceback.print_exc()
        os._exit(1)


def _stop(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: a second must not interrupt the unwinding
    raise Stopped


def _function(name: str) -> Callable[..., dict]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _answer(name: str, cell: Any, report: "_Reporter") -> tuple[str, Any]:
    """Do one run: ("finished", scores or None), ("failed", reason), ("mistake", what), or ("elsewhere", who has it).

    A mistake of the user's (`UserError`, a package that is missing) is no result of the run: nothing is recorded.
    """
    directory = cell.directory
    with claim(directory) as held:
        if held is not None:
            return "elsewhere", str(held.holder or "another process")
        if state_of(directory) == FINISHED:  # by another sweep, since ours began
            return "finished", None
        try:
            with _output_to(directory / LOG):
                function = _function(name)
                results = function(cell, report) if _takes_report(function) else function(cell)
        except (UserError, ImportError) as error:
            return "mistake", str(error)
        except Exception as error:  # noqa: BLE001  (one run's failure is never another's)
            reason = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
            write_failure(directory, reason, traceback.format_exc())
            return "failed", reason
        write_results(directory, results)
        return "finished", {split: results[split]["score"] for split in ("validation", "test")}


def _takes_report(function: Callable) -> bool:
    return len(inspect.signature(function).parameters) > 1


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Everything that is printed, by C code and child processes too, goes to the file at `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


class _Reporter:
    """What a run may call at each step: `report(step, total)`."""

    def __init__(self, connection: Connection):
        self._connection, self._last = connection, 0.0

    def __call__(self, step: int, total: int) -> None:
        now = time.monotonic()
        if step == total or now - self._last >= SECONDS_BETWEEN_STEPS:
            self._last = now
            self._connection.send(("step", (step, total)))


if __name__ == "__main__":
    main()
