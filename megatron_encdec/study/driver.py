"""`study run`: do what the plan says, in the order of what waits for what.

    1. look at the disk: what is there is done; jobs of an earlier driver that still run are found
    2. start what can start, as many at a time as the executor has room for
    3. a job that ends without what it is for is started again as long as it gets on; else it has failed, and what
       waits for it is left
    4. checkpoints that nothing needs any more go; at the end comes the report

The driver holds no state of its own: killed anywhere and started again, it goes on.
"""

import signal
import sys
import time
from pathlib import Path

from megatron_encdec.finetune.results_tree import FAILED, reason_of, state_of
from megatron_encdec.platform.errors import RunFailed, UserError, code_of
from megatron_encdec.platform.progress import Progress, duration
from megatron_encdec.platform.signals import StopSignals, how_it_ended
from megatron_encdec.rundir.lock import FolderLock
from megatron_encdec.study.jobs import Job, jobs_of, tail
from megatron_encdec.study.local import LocalExecutor
from megatron_encdec.study.plan import StudyPlan
from megatron_encdec.study.report import report_study
from megatron_encdec.study.slurm import SlurmExecutor
from megatron_encdec.study.store import Status, Store, prune

SECONDS, SHOWN_SECONDS = 1.0, 5.0  # between looks at what runs: whether it has ended, and how far it has come
SECONDS_BETWEEN_LINES = 30.0  # of what runs, where there is no terminal
ATTEMPTS = 2  # of a job that does not get on
LOG_LINES = 3


class Driver:
    """Does `plan` with `executor`. keep_all: no checkpoint of a finished stretch is deleted."""

    def __init__(self, plan: StudyPlan, executor: LocalExecutor | SlurmExecutor, keep_all: bool = False):
        self._plan, self._executor, self._keep_all = plan, executor, keep_all
        self._store = Store(Path(plan.study.output))
        self._failed: dict[str, str] = {}  # key -> why
        self._attempts: dict[str, int] = {}  # without getting on
        self._shown: Progress | None = None
        self._seen = 0.0
        self._began: dict[str, tuple[float, int]] = {}  # when, and from which position

    def run(self) -> int:
        """Work until nothing is left that can be done, or a signal comes; the exit code. Raises `RunFailed` where
        something has failed, `UserError` where another driver works on this study."""
        if self._plan.facts.missing:
            raise UserError(f"{self._plan.study.base}: not there: {'; '.join(self._plan.facts.missing)}")
        with FolderLock(self._store.output, "output"), StopSignals((signal.SIGTERM, signal.SIGINT)) as signals:
            self._look()
            self._executor.check(self._jobs.values())
            for note in self._status.notes:
                self._say(note)
            with Progress("study", len(self._jobs), counts=True, seconds=SECONDS_BETWEEN_LINES,
                          stream=sys.stdout) as self._shown:
                for job in self._executor.find(self._jobs.values()):
                    self._begin(job, "still runs")
                self._start()
                while signals.received is None and self._executor.running:
                    time.sleep(SECONDS)
                    if self._hear() and signals.received is None:
                        self._start()
                    self._show()
                if signals.received is not None:
                    self._stop(signals)
                    return code_of(signals.received)
        if self._plan.study.finetune and any((self._store.output / "results").glob("*/*/*/*/results.json")):
            try:
                report_study(self._plan)
            except UserError as error:
                self._failed["report"] = str(error)
        if self._jobs or self._failed:
            left = len(self._jobs.keys() - self._failed.keys())
            raise RunFailed("\n".join([
                *(f"{key}: {why}" for key, why in self._failed.items()),
                f"{len(self._failed)} failed, {left} wait for them; all else is done. Mend it, or delete what is to be "
                f"made again under {self._store.output}, and give the same command again"]))
        failed = [path for path in (self._store.output / "results").glob("*/*/*/*/failure.json")
                  if state_of(path.parent) == FAILED]
        self._say(f"{self._store.output}: all is done" + (
            f", but {len(failed)} runs of fine-tuning failed, the first: {reason_of(failed[0].parent)} "
            f"({failed[0]})" if failed else ""))
        return 0

    def _look(self) -> None:
        """What is to do, as the disk says; what nothing needs goes."""
        self._status = Status(self._plan, self._store)
        self._jobs = jobs_of(self._status)
        if not self._keep_all:
            running = {key.partition("/")[2] for key in self._executor.running}
            for name in prune(self._status, running):
                self._say(f"{name}: checkpoint deleted, nothing needs it any more")

    def _start(self) -> None:
        """Start what can start now: nothing more can before a job has ended."""
        for key, job in self._jobs.items():
            under_way = self._executor.running if self._executor.waits_itself else ()
            waits = any(need in self._jobs and need not in under_way for need in job.needs)
            if waits or key in self._failed or key in self._executor.running or not self._executor.has_room(job):
                continue
            try:
                job.folder.mkdir(parents=True, exist_ok=True)
                job.prepare()
                self._executor.start(job)
            except (OSError, UserError) as error:
                why = f"{error.strerror} ({error.filename or job.folder})" if isinstance(error, OSError) else error
                self._failed[key] = f"cannot be started: {why}"
                self._say(f"{key}: FAILED, {self._failed[key]}")
                continue
            self._begin(job, "started")

    def _begin(self, job: Job, what: str) -> None:
        self._began[job.key] = time.monotonic(), job.position()[0]
        self._say(f"{job.key}: {what}")

    def _hear(self) -> bool:
        """Whether a job has ended; what became of it is said."""
        ended = self._executor.ended()
        if ended:
            self._look()
        for job, code in ended:
            self._shown.part_ended(job.key)
            began, position = self._began[job.key]
            if job.done():
                self._say(f"{job.key}: done in {duration(time.monotonic() - began)}")
            elif not any(need in self._jobs for need in job.needs):  # else it was given up with what it needs
                self._judge(job, code, job.position()[0] > position)
        return bool(ended)

    def _judge(self, job: Job, code: int | None, got_on: bool) -> None:
        """A job ended without what it is for: once more, or never mind."""
        self._attempts[job.key] = 1 if got_on else self._attempts.get(job.key, 0) + 1
        how = "ended" if code is None else how_it_ended(code)
        if code == 2 or self._attempts[job.key] >= ATTEMPTS:
            self._failed[job.key] = f"{how}: {_last_lines(job)} ({job.folder / 'log.txt'})"
            self._say(f"{job.key}: FAILED, {self._failed[job.key]}")
        else:
            self._say(f"{job.key}: {how} before its end; once more")

    def _stop(self, signals: StopSignals) -> None:
        """Have local jobs save and end."""
        self._say(f"{signal.Signals(signals.received).name}: {len(self._executor.running)} jobs are under way")
        self._say(f"stopped: {self._executor.stop(signal.SIGTERM)}; the same command goes on")

    def _show(self) -> None:
        if time.monotonic() - self._seen < SHOWN_SECONDS:
            return
        self._seen = time.monotonic()
        for key, job in self._executor.running.items():
            self._shown.part(key, key, *job.position())

    def _say(self, line: str) -> None:
        if self._shown:
            self._shown.say(line)
        else:
            print(line, flush=True)


def _last_lines(job: Job) -> str:
    """What its log ends with."""
    lines = tail(job.folder / "log.txt").strip().splitlines()
    return " / ".join(line.strip() for line in lines[-LOG_LINES:]) or "it said nothing"
