"""A sweep: the runs of a grid, learning rates x seeds, done by workers until each is finished or has failed.

    1. what is on disk decides what is to do: a finished run is never repeated (results_tree.py)
    2. workers get runs, those of one dataset to the same worker where possible: models and data stay loaded
    3. a run that another sweep works on is waited for, and done here if the other gives it up
    4. a worker that dies is replaced, its run tried once more: one that ends two processes has failed
    5. SIGTERM or Ctrl-C ends all runs at once, leaving no file half-written; the next launch repeats them
"""

import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from megatron_encdec.finetune.results_tree import FAILED, FINISHED, TODO, plan, reason_of, state_of, write_failure
from megatron_encdec.platform.children import Child
from megatron_encdec.platform.progress import Progress, duration
from megatron_encdec.platform.signals import StopSignals
from megatron_encdec.rundir.lock import FolderLock, InUse

GRACE_SECONDS = 20.0  # for workers to end after SIGTERM
RETRY_SECONDS = 2.0  # between looks at runs that another sweep works on
SIGNAL_SECONDS = 0.2  # between looks at signals
SECONDS_BETWEEN_LINES = 30.0  # of runs under way, where there is no terminal
ATTEMPTS = 2  # of a run whose process died


class HasDirectory(Protocol):
    """What a sweep knows of a run: its folder. It is sent to workers, so it pickles."""

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


@dataclass
class _Worker:
    """A child process, and the run that it works on (None: idle)."""

    slot: int
    child: Child
    run: Any = None
    dataset: Path | None = None  # of its newest run: what it has loaded
    began: float = 0.0


class Sweep:
    """Does `runs` with `function`, a "package.module:name" called in the workers as `function(run, report)`.

    It returns what results.json is to hold, which the worker writes; it may call `report(step, total)`, which raises
    where another sweep has taken the run over. A `UserError`
    of it is a mistake to mend (nothing is recorded), any other exception a failure of that run. workers: processes at
    a time. gpus: their numbers as CUDA_VISIBLE_DEVICES knows them, dealt out in turn; empty on a CPU, where `threads`
    is each worker's share of the cores.
    """

    def __init__(self, runs: Sequence[HasDirectory], function: str, workers: int = 1, gpus: Sequence[str] = (),
                 threads: int = 1, retry_failed: bool = False):
        self._runs, self._function = list(runs), function
        self._gpus, self._threads = list(gpus), threads
        self._size, self._retry_failed = workers, retry_failed
        states = {run.directory: state_of(run.directory) for run in runs}
        again = (TODO, FAILED) if retry_failed else (TODO,)
        self._queue = [run for run in runs if states[run.directory] in again]
        self._waiting: list[Any] = []  # for another sweep
        self._seen_elsewhere: set[Path] = set()
        self._looked = 0.0
        self._deaths: Counter[Path] = Counter()
        self._workers: list[_Worker] = []
        self._outcome = Outcome(len(runs), sum(state == FINISHED for state in states.values()))
        if not retry_failed:
            self._outcome.failed = [(path, reason_of(path)) for path, state in states.items() if state == FAILED]
        plan(states)

    def run(self) -> Outcome:
        """Work until nothing is left or a signal comes."""
        outcome = self._outcome
        if not self._queue:
            return outcome
        with StopSignals((signal.SIGTERM, signal.SIGINT)) as signals, Progress(
                "runs", outcome.total, done=outcome.total - outcome.left, counts=True, stream=sys.stdout,
                seconds=SECONDS_BETWEEN_LINES) as self._shown:
            try:
                while (self._queue or self._waiting or self._busy) and signals.received is None:
                    self._hand_out()
                    self._hear()
            finally:
                self._end(signals)
            if signals.received is not None:  # a run may have ended between that and its worker's end: the disk knows
                finished = sum(state_of(run.directory) == FINISHED for run in self._runs)
                outcome.ran += finished - outcome.finished
                outcome.finished, outcome.stopped_by = finished, signals.received
        return outcome

    @property
    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.run is not None]

    def _hand_out(self) -> None:
        """Give every idle worker a run, starting workers where there are too few."""
        while self._queue:
            idle = [worker for worker in self._workers if worker.run is None]
            if not idle and len(self._workers) == self._size:
                return
            worker = idle[0] if idle else self._start()
            worker.run, worker.began = self._next(worker), time.monotonic()
            worker.child.send(worker.run)
            self._shown.part(worker.slot, name_of(worker.run.directory))

    def _start(self) -> _Worker:
        slot = min(set(range(self._size)) - {worker.slot for worker in self._workers})
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        worker = _Worker(slot, Child(self._threads, gpu))
        worker.child.begin("megatron_encdec.finetune.sweep_worker:make_runner", (self._function,))
        self._workers.append(worker)
        return worker

    def _next(self, worker: _Worker) -> Any:
        """A run of the dataset that the worker has loaded, else of the one with most left for each worker on it."""
        left = Counter(run.directory.parent for run in self._queue)
        dataset = worker.dataset
        if dataset not in left:
            taken = Counter(one.dataset for one in self._busy)
            dataset = max(left, key=lambda one: left[one] / (1 + taken[one]))
        run = next(run for run in self._queue if run.directory.parent == dataset)
        self._queue.remove(run)
        worker.dataset = dataset
        return run

    def _hear(self) -> None:
        """Wait for a message, or the time to look at signals and other sweeps' runs again."""
        workers = {worker.child.connection: worker for worker in self._workers}
        for connection in wait(workers, timeout=SIGNAL_SECONDS):
            self._take(workers[connection])
        if self._waiting and time.monotonic() - self._looked >= RETRY_SECONDS:
            self._look_again()

    def _look_again(self) -> None:
        """What became of the runs that another sweep had; those without an end are tried here."""
        self._looked = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for run in waiting:
            state = state_of(run.directory)
            if state == FINISHED:
                self._finished(None, run.directory, None)
            elif state == FAILED and not self._retry_failed:
                self._failed(None, run.directory, reason_of(run.directory))
            else:
                self._queue.append(run)

    def _take(self, worker: _Worker) -> None:
        message = worker.child.receive()
        if message is None:
            self._died(worker)
            return
        name, content = message
        if name == "told":
            self._shown.part(worker.slot, name_of(worker.run.directory), *content)
            return
        self._shown.part_ended(worker.slot)
        run, worker.run = worker.run, None
        kind, what = content
        if kind == "finished":
            self._finished(worker, run.directory, what)
        elif kind in ("elsewhere", "taken"):
            self._elsewhere(run, what)
        elif kind == "mistake":
            self._mistake(run, what)
        else:
            self._failed(worker, run.directory, what)
        if kind in ("failed", "taken"):
            self._workers.remove(worker)  # whatever the run left behind in its process must not reach the next one
            worker.child.send_signal(signal.SIGKILL)
            worker.child.close()

    def _mistake(self, run: HasDirectory, what: str) -> None:
        """What the user must mend: the runs of the same dataset would fail alike and stay to be done."""
        self._queue = [one for one in self._queue if one.directory.parent != run.directory.parent]
        if what not in self._outcome.mistakes:
            self._outcome.mistakes.append(what)
            self._shown.say(f"{name_of(run.directory)}: {what}")

    def _finished(self, worker: _Worker | None, directory: Path, scores: dict | None) -> None:
        """`worker` is None for another sweep's run, and `scores` then too."""
        self._outcome.finished += 1
        self._outcome.ran += scores is not None
        self._say_ended(worker, directory, "  ".join(f"{split} {100 * score:.2f}" for split, score in scores.items())
                        if scores else "finished by another sweep")

    def _elsewhere(self, run: HasDirectory, holder: str) -> None:
        if run.directory not in self._seen_elsewhere:
            self._seen_elsewhere.add(run.directory)
            self._shown.say(f"{name_of(run.directory)}: {holder} works on it; waiting for that")
        self._waiting.append(run)

    def _failed(self, worker: _Worker | None, directory: Path, reason: str) -> None:
        self._outcome.failed.append((directory, reason))
        self._outcome.ran += worker is not None
        self._say_ended(worker, directory, f"FAILED: {' '.join(reason.split())}")

    def _say_ended(self, worker: _Worker | None, directory: Path, how: str) -> None:
        """A line for a run that is over; its scores, or why it failed, are in `how`."""
        outcome, shown = self._outcome, self._shown
        done, failed = outcome.total - outcome.left, len(outcome.failed)
        took = f"  {duration(time.monotonic() - worker.began)}" if worker else ""
        left = f"  {shown.time_left(done)} left" if outcome.left else ""
        shown.say(f"{done}/{outcome.total}  {name_of(directory)}  {how}{took}{left}")
        shown.update(done, f"{failed} failed" if failed else "")

    def _died(self, worker: _Worker) -> None:
        """Replace a worker whose process ended by itself; its run gets another chance."""
        self._workers.remove(worker)
        run, how = worker.run, worker.child.close()
        if run is None:
            return
        self._shown.part_ended(worker.slot)
        self._deaths[run.directory] += 1
        if self._deaths[run.directory] < ATTEMPTS:
            self._shown.say(f"{name_of(run.directory)}: its process {how}; once more")
            self._queue.insert(0, run)
            return
        reason = f"its process {how}, {ATTEMPTS} times"
        try:
            with FolderLock(run.directory, "results", patience=None):
                write_failure(run.directory, reason)
        except InUse as refused:
            self._elsewhere(run, refused.who)
            return
        self._failed(worker, run.directory, reason)

    def _end(self, signals: StopSignals) -> None:
        """End the workers: at once where they are idle, with some grace where they work."""
        children = [worker.child for worker in self._workers]
        for child in children:
            child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(child.process.poll() is None for child in children):
            if time.monotonic() > deadline or signals.repeated:
                for child in children:
                    child.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        for child in children:
            child.close()


def name_of(directory: Path) -> str:
    """`model/SC/dataset/lr1e-05_sd0` of a run's folder."""
    return "/".join(directory.parts[-4:])
