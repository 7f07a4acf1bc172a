"""A sweep: the runs of a grid, learning rates x seeds, done by workers until each is finished or has failed.

    1. what is on disk decides what is to do           results_tree.py: a finished run is never repeated
    2. workers get runs, those of one dataset to the   sweep_worker(s).py: models and data stay loaded
       same worker where possible
    3. a run that another sweep works on is waited     two sweeps on one tree share its runs
       for, and done here if the other gives it up
    4. a worker that dies is replaced, its run tried   a run that ends two processes has failed
       once more
    5. SIGTERM or Ctrl-C ends all runs at once; they   no file of theirs is left half-written
       are repeated by the next launch
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, Self

from megatron_encdec.finetune.results_tree import FAILED, FINISHED, TODO, plan, reason_of, state_of, write_failure
from megatron_encdec.finetune.sweep_progress import SweepProgress, name_of
from megatron_encdec.finetune.sweep_workers import Worker

GRACE_SECONDS = 20.0  # for workers to end after SIGTERM
RETRY_SECONDS = 2.0  # between looks at runs that another sweep works on
ATTEMPTS = 2  # of a run whose process died


class HasDirectory(Protocol):
    """What a sweep knows of a cell: the folder of its run. It is sent to workers, so it pickles."""

    directory: Path


@dataclass
class Outcome:
    """Of one launch. `finished` and `failed` are of all runs of the grid, `ran` of this launch alone; `mistakes` are
    what the user must mend before the runs that are left can be done; `stopped_by` is a signal's number."""

    total: int
    finished: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)
    ran: int = 0
    mistakes: list[str] = field(default_factory=list)
    stopped_by: int | None = None

    @property
    def left(self) -> int:
        """Runs that are still to do."""
        return self.total - self.finished - len(self.failed)


class Sweep:
    """Does `cells` with `function`, a "package.module:name" called in the workers as `function(cell[, report])`.

    It returns what results.json is to hold, which the worker writes; it may call `report(step, total)`. A `UserError`
    of it is a mistake to mend (nothing is recorded), any other exception a failure of that run. group: what cells
    share that is worth keeping loaded (default: the folder of their dataset). workers: processes at a time. gpus:
    their numbers as CUDA_VISIBLE_DEVICES knows them, dealt out in turn; empty on a CPU, where `threads` is each
    worker's share of the cores.
    """

    def __init__(self, cells: Sequence[HasDirectory], function: str, workers: int = 1, gpus: Sequence[str] = (),
                 threads: int = 1, retry_failed: bool = False,
                 group: Callable[[Any], Any] = lambda cell: cell.directory.parent):
        self._cells, self._function, self._group = list(cells), function, group
        self._gpus, self._threads = list(gpus), threads
        self._size, self._retry_failed = workers, retry_failed
        states = {cell.directory: state_of(cell.directory) for cell in cells}
        again = (TODO, FAILED) if retry_failed else (TODO,)
        self._queue = [cell for cell in cells if states[cell.directory] in again]
        self._waiting: list[Any] = []  # for another sweep
        self._seen_elsewhere: set[Path] = set()
        self._looked = 0.0
        self._deaths: Counter[Path] = Counter()
        self._workers: list[Worker] = []
        self._outcome = Outcome(len(cells), sum(state == FINISHED for state in states.values()))
        if not retry_failed:
            self._outcome.failed = [(path, reason_of(path)) for path, state in states.items() if state == FAILED]
        plan(states)

    def run(self) -> Outcome:
        """Work until nothing is left or a signal comes."""
        outcome = self._outcome
        if not self._queue:
            return outcome
        with _StopSignals() as signals, SweepProgress(outcome.total, outcome.finished, len(outcome.failed)) as shown:
            try:
                while (self._queue or self._waiting or self._busy) and signals.received is None:
                    self._hand_out(shown)
                    self._hear(shown, signals)
            finally:
                self._end(signals)
            if signals.received is not None:
                self._count_stopped(signals.received)
        return outcome

    def _count_stopped(self, number: int) -> None:
        """A run may have ended between the signal and its worker's end: only the disk knows."""
        outcome, cells = self._outcome, self._cells
        finished = sum(state_of(cell.directory) == FINISHED for cell in cells)
        outcome.ran += finished - outcome.finished
        outcome.finished, outcome.stopped_by = finished, number

    @property
    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.cell is not None]

    def _hand_out(self, shown: SweepProgress) -> None:
        """Give every idle worker a run, starting workers where there are too few."""
        while self._queue:
            idle = [worker for worker in self._workers if worker.cell is None]
            if not idle and len(self._workers) == self._size:
                return
            worker = idle[0] if idle else self._start()
            cell = self._next(worker.group)
            worker.give(self._function, cell, self._group(cell))
            shown.begun(worker.slot, cell.directory)

    def _start(self) -> Worker:
        slot = min(set(range(self._size)) - {worker.slot for worker in self._workers})
        worker = Worker(slot, self._gpus[slot % len(self._gpus)] if self._gpus else None, self._threads)
        self._workers.append(worker)
        return worker

    def _next(self, group: Any) -> Any:
        """A run of the worker's group, else of the group that has most left for each worker on it."""
        left = Counter(self._group(cell) for cell in self._queue)
        if group not in left:
            taken = Counter(worker.group for worker in self._busy)
            group = max(left, key=lambda one: left[one] / (1 + taken[one]))
        cell = next(cell for cell in self._queue if self._group(cell) == group)
        self._queue.remove(cell)
        return cell

    def _hear(self, shown: SweepProgress, signals: "_StopSignals") -> None:
        """Wait for a message, a signal, or the time to look at other sweeps' runs again."""
        workers = {worker.connection: worker for worker in self._workers}
        for source in wait([*workers, signals.descriptor], timeout=RETRY_SECONDS if self._waiting else None):
            if source in workers:
                self._take(workers[source], shown)
        if self._waiting and time.monotonic() - self._looked >= RETRY_SECONDS:
            self._look_again(shown)

    def _look_again(self, shown: SweepProgress) -> None:
        """What became of the runs that another sweep had; those without an end are tried here."""
        self._looked = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for cell in waiting:
            state = state_of(cell.directory)
            if state == FINISHED:
                self._finished(None, cell.directory, None, shown)
            elif state == FAILED and not self._retry_failed:
                self._failed(None, cell.directory, reason_of(cell.directory), shown)
            else:
                self._queue.append(cell)

    def _take(self, worker: Worker, shown: SweepProgress) -> None:
        message = worker.receive()
        if message is None:
            self._died(worker, shown)
            return
        kind, content = message
        if kind == "step":
            shown.step(worker.slot, *content)
            return
        cell, worker.cell = worker.cell, None
        if kind == "finished":
            self._finished(worker.slot, cell.directory, content, shown)
        elif kind == "elsewhere":
            self._elsewhere(worker.slot, cell, content, shown)
        elif kind == "mistake":
            self._mistake(worker.slot, cell, content, shown)
        else:
            self._failed(worker.slot, cell.directory, content, shown)
            self._workers.remove(worker)  # whatever the run left behind in its process must not reach the next one
            worker.kill()
            worker.close()

    def _mistake(self, slot: int, cell: HasDirectory, what: str, shown: SweepProgress) -> None:
        """What the user must mend: the runs of the same group would fail alike and stay to be done."""
        group = self._group(cell)
        self._queue = [one for one in self._queue if self._group(one) != group]
        shown.idle(slot)
        if what not in self._outcome.mistakes:
            self._outcome.mistakes.append(what)
            shown.say(f"{name_of(cell.directory)}: {what}")

    def _finished(self, slot: int | None, directory: Path, scores: dict | None, shown: SweepProgress) -> None:
        self._outcome.finished += 1
        self._outcome.ran += scores is not None
        text = "  ".join(f"{split} {100 * score:.2f}" for split, score in scores.items()) if scores \
            else "finished by another sweep"
        shown.ended(slot, directory, text, False)

    def _elsewhere(self, slot: int, cell: HasDirectory, holder: str, shown: SweepProgress) -> None:
        if cell.directory not in self._seen_elsewhere:
            self._seen_elsewhere.add(cell.directory)
            shown.say(f"{name_of(cell.directory)}: {holder} works on it; waiting for that")
        self._waiting.append(cell)
        shown.idle(slot)

    def _failed(self, slot: int | None, directory: Path, reason: str, shown: SweepProgress) -> None:
        self._outcome.failed.append((directory, reason))
        self._outcome.ran += slot is not None
        shown.ended(slot, directory, f"FAILED: {' '.join(reason.split())}", True)

    def _died(self, worker: Worker, shown: SweepProgress) -> None:
        """Replace a worker whose process ended by itself; its run gets another chance."""
        self._workers.remove(worker)
        cell, how = worker.cell, worker.close()
        if cell is None:
            return
        shown.idle(worker.slot)
        self._deaths[cell.directory] += 1
        if self._deaths[cell.directory] < ATTEMPTS:
            shown.say(f"{name_of(cell.directory)}: its process was ended {how}; once more")
            self._queue.insert(0, cell)
            return
        reason = f"its process was ended {how}, {ATTEMPTS} times"
        write_failure(cell.directory, reason)
        self._failed(worker.slot, cell.directory, reason, shown)

    def _end(self, signals: "_StopSignals") -> None:
        """End the workers: at once where they are idle, with some grace where they work."""
        for worker in self._workers:
            worker.stop()
        deadline = time.monotonic() + GRACE_SECONDS
        while any(worker.process.poll() is None for worker in self._workers):
            if time.monotonic() > deadline or signals.count > 1:
                for worker in self._workers:
                    worker.kill()
            time.sleep(0.02)
        for worker in self._workers:
            worker.close()


class _StopSignals:
    """Notes SIGTERM and SIGINT; `descriptor` becomes readable with the first. Main thread only."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: int | None = None
        self.count = 0

    def __enter__(self) -> Self:
        self.descriptor, self._write = os.pipe()
        self._previous = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self.descriptor)
        os.close(self._write)

    def _note(self, number: int, _frame) -> None:
        self.count += 1
        if self.received is None:
            self.received = number
            os.write(self._write, b"s")
