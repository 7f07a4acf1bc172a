"""A sweep: the runs of a grid, learning rates x seeds, done by workers until each is finished or has failed.

    1. what is on disk decides what is to do: a finished run is never repeated (results_tree.py)
    2. workers get runs, those of one dataset to the same worker where possible: models and data stay loaded
    3. a worker does a run under the lock of its folder, and writes its results or its failure (`make_runner`)
    4. a run that another sweep works on is waited for, and done here if the other gives it up
    5. a worker that dies is replaced, its run tried once more: one that ends two processes has failed
    6. SIGTERM or Ctrl-C ends all runs at once, leaving no file half-written; the next launch repeats them
"""

import contextlib
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from megatron_encdec.finetune import results_tree
from megatron_encdec.finetune.results_tree import FAILED, FINISHED, TODO, state_of
from megatron_encdec.platform.children import Child, tell
from megatron_encdec.platform.errors import RunFailed, UserError
from megatron_encdec.platform.progress import Progress, duration
from megatron_encdec.platform.signals import StopSignals
from megatron_encdec.rundir.failure import write_failure
from megatron_encdec.rundir.lock import Claim, FolderLock, InUse

GRACE_SECONDS = 20.0  # for workers to end after SIGTERM
RETRY_SECONDS = 2.0  # between looks at runs that another sweep works on
SIGNAL_SECONDS = 0.2  # between looks at signals
SECONDS_BETWEEN_LINES = 30.0  # of runs under way, where there is no terminal
ATTEMPTS = 2  # of a run whose process died
LOG = "log.txt"  # in the run's folder: what the run printed
SECONDS_BETWEEN_STEPS = 0.2  # between a worker's messages of progress


@dataclass
class Outcome:
    """Of one launch."""

    total: int  # runs of the grid
    finished: int = 0  # of all of them
    failed: list[tuple[Path, str]] = field(default_factory=list)  # of all of them, with the reason
    ran: int = 0  # by this launch
    mistakes: list[str] = field(default_factory=list)  # to mend before the runs that are left can be done
    stopped_by: int | None = None  # a signal's number

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
    """Does `runs`, which have a `directory` and pickle, with `function`, a "package.module:name" called in the workers
    as `function(run, report)`.

    It returns what results.json is to hold, which the worker writes; it may call `report(step, total)`, which raises
    where another sweep has taken the run over. A `UserError`
    of it is a mistake to mend (nothing is recorded), any other exception a failure of that run. workers: processes at
    a time. gpus: their numbers as CUDA_VISIBLE_DEVICES knows them, dealt out in turn; empty on a CPU, where `threads`
    is each worker's share of the cores.
    """

    def __init__(self, runs: Sequence[Any], function: str, workers: int = 1, gpus: Sequence[str] = (),
                 threads: int = 1, retry_failed: bool = False):
        self._runs, self._function, self._size = list(runs), function, workers
        self._gpus, self._threads, self._retry_failed = list(gpus), threads, retry_failed
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
            self._outcome.failed = [(path, results_tree.reason_of(path))
                                    for path, state in states.items() if state == FAILED]
        results_tree.plan(states)

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
        worker.child.begin("megatron_encdec.finetune.sweep:make_runner", (self._function,))
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
                self._finished(run.directory, None)
            elif state == FAILED and not self._retry_failed:
                self._failed(run.directory, results_tree.reason_of(run.directory))
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
            self._finished(run.directory, what, worker)
        elif kind in ("elsewhere", "taken"):
            self._elsewhere(run, what)
        elif kind == "mistake":
            self._mistake(run.directory, what)
        else:
            self._failed(run.directory, what, worker)
        if kind in ("failed", "taken"):
            self._workers.remove(worker)  # whatever the run left behind in its process must not reach the next one
            worker.child.process.send_signal(signal.SIGKILL)
            worker.child.close()

    def _mistake(self, directory: Path, what: str) -> None:
        """What the user must mend: the runs of the same dataset would fail alike and stay to be done."""
        self._queue = [run for run in self._queue if run.directory.parent != directory.parent]
        if what not in self._outcome.mistakes:
            self._outcome.mistakes.append(what)
            self._shown.say(f"{name_of(directory)}: {what}")

    def _finished(self, directory: Path, scores: dict | None, worker: _Worker | None = None) -> None:
        """`scores` and, where it did not begin here, `worker` are None for another sweep's run."""
        self._outcome.finished += 1
        self._outcome.ran += scores is not None
        self._say_ended(directory, "  ".join(f"{split} {100 * score:.2f}" for split, score in scores.items())
                        if scores else "finished by another sweep", worker)

    def _elsewhere(self, run: Any, holder: str) -> None:
        if run.directory not in self._seen_elsewhere:
            self._seen_elsewhere.add(run.directory)
            self._shown.say(f"{name_of(run.directory)}: {holder} works on it; waiting for that")
        self._waiting.append(run)

    def _failed(self, directory: Path, reason: str, worker: _Worker | None = None) -> None:
        self._outcome.failed.append((directory, reason))
        self._outcome.ran += worker is not None
        self._say_ended(directory, f"FAILED: {' '.join(reason.split())}", worker)

    def _say_ended(self, directory: Path, how: str, worker: _Worker | None) -> None:
        outcome, shown = self._outcome, self._shown
        done, failed = outcome.total - outcome.left, len(outcome.failed)
        took = f"  {duration(time.monotonic() - worker.began)}" if worker else ""
        left = f"  {shown.time_left(done)} left" if outcome.left else ""
        shown.say(f"{done}/{outcome.total}  {name_of(directory)}  {how}{took}{left}")
        shown.update(done, f"{failed} failed" if failed else "")

    def _died(self, worker: _Worker) -> None:
        """Do without a worker whose process ended by itself; its run gets another chance."""
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
        self._failed(run.directory, reason, worker)

    def _end(self, signals: StopSignals) -> None:
        """End the workers: at once where they are idle, with some grace where they work."""
        children = [worker.child for worker in self._workers]
        for child in children:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(child.process.poll() is None for child in children):
            if time.monotonic() > deadline or signals.repeated:
                for child in children:
                    child.process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        for child in children:
            child.close()


def make_runner(function: str) -> Callable[[Any], tuple[str, Any]]:
    """A function that does a run by calling `function` ("module:name", as in `Sweep`).

    It returns ("finished", scores or None), ("failed", reason), ("mistake", what), ("elsewhere", who has it) or, where
    another sweep took the run over meanwhile (this process was stopped, or its disk away, for a minute), ("taken", who
    has it). A mistake of the user's (`UserError`, a package that is missing) is no result of the run: nothing is
    recorded.
    """
    def do(run: Any) -> tuple[str, Any]:
        try:
            with FolderLock(run.directory, "results", patience=None) as lock:
                try:
                    return _do_alone(function, run, lock.claim)
                except InUse as lost:
                    return "taken", lost.who
        except InUse as refused:
            return "elsewhere", refused.who

    return do


def _do_alone(function: str, run: Any, claim: Claim) -> tuple[str, Any]:
    if state_of(run.directory) == FINISHED:  # by another sweep, since ours began
        return "finished", None
    try:
        with _output_to(run.directory / LOG):
            results = pkgutil.resolve_name(function)(run, _reporter(claim))
        results_tree.check_scores(results)
    except InUse:
        raise
    except (UserError, ImportError) as error:
        return "mistake", str(error)
    except Exception as error:  # one run's failure is never another's
        claim.check()
        reason = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        write_failure(run.directory, reason, traceback.format_exc())
        return "failed", reason
    claim.check()
    results_tree.write_results(run.directory, results)
    return "finished", {split: results[split]["score"] for split in ("validation", "test")}


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Everything that is printed, by C code and child processes too, goes to the file at `path`."""
    _flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with open(path, "wb") as file:
        for descriptor in kept:
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        _flush()
        for descriptor, old in kept.items():
            os.dup2(old, descriptor)
            os.close(old)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _reporter(claim: Claim) -> Callable[[int, int], None]:
    """What a run calls at each step, and again before it writes: `report(step, total)`. Raises `InUse` where its folder
    is another process's now."""
    last = 0.0

    def report(step: int, total: int) -> None:
        nonlocal last
        if step == total or time.monotonic() - last >= SECONDS_BETWEEN_STEPS:
            last = time.monotonic()
            claim.check()
            tell((step, total))

    return report


def name_of(directory: Path) -> str:
    """`model/SC/dataset/lr1e-05_sd0` of a run's folder."""
    return "/".join(directory.parts[-4:])
