"""Jobs as Slurm jobs, through submitit: a job a stretch, an export, a model's fine-tuning, with dependencies.

    1. `SlurmExecutor.start(job)`    submitted at once; Slurm starts it when the jobs that it needs have succeeded
    2. `Task`                        what each task of a job runs: one of our commands; a stretch has a task a rank
    3. `SlurmExecutor.find(jobs)`    those of an earlier driver, by the batch script that squeue names: it lies in the
                                     job's folder, whatever else the driver had time to write
    4. `SlurmExecutor.ended()`       jobs that squeue knows no more; the disk says whether they did what they were for

At the time limit, or when preempted, submitit's signal (USR2) has the ranks save; the job is then queued again by
itself, but not where it got no further `LIMIT` times in a row. So jobs go on while no driver runs.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_encdec.engine.integrity import saved_names
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.study.jobs import Job

LIMIT = 3  # requeues without a new checkpoint
SECONDS = 5.0  # between two calls of squeue
FOR_EVER = 1_000_000  # submitit's own limit counts preemptions as well


@dataclass
class Task:
    """One task of a job. folder: the job's. checkpoints: of its run, to see whether it gets on."""

    words: list[str]
    folder: str
    checkpoints: str | None
    child: Any = field(default=None, repr=False)

    def __call__(self) -> None:
        """Run the command; an exit code other than 0 fails the job."""
        with open(Path(self.folder) / "log.txt", "ab") as log:
            self.child = subprocess.Popen([sys.executable, "-m", "megatron_encdec", *self.words], stdout=log,
                                          stderr=log, stdin=subprocess.DEVNULL, preexec_fn=_ignore_early_signals)
        if code := self.child.wait():
            raise RuntimeError(f"megatron-encdec {self.words[0]} ended with exit code {code}")

    def checkpoint(self):
        """Called by submitit at its signal, on the first rank: save, then be queued again, or give up (None)."""
        import submitit

        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGTERM)  # one rank is enough: all of them save
            self.child.wait()
        record = Path(self.folder) / "requeues.json"
        newest = saved_names(Path(self.checkpoints)) if self.checkpoints else []
        before = json.loads(record.read_text()) if record.exists() else {"checkpoints": [], "without": 0}
        without = 0 if newest != before["checkpoints"] else before["without"] + 1
        write_json_atomic(record, {"checkpoints": newest, "without": without})
        if self.checkpoints is not None and without >= LIMIT:
            return None
        return submitit.helpers.DelayedSubmission(Task(self.words, self.folder, self.checkpoints))


def _ignore_early_signals() -> None:
    """Slurm signals all processes of a step: until the command has handlers of its own, that must not end it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class SlurmExecutor:
    """Submits jobs; `parameters` are those of submitit's executor (`timeout_min`, `slurm_partition`, ...)."""

    waits_itself = True  # a job may be started before those that it needs have ended

    def __init__(self, parameters: dict[str, Any]):
        self._submitit = require("submitit", "study run --executor slurm")
        if missing := [program for program in ("sbatch", "squeue") if shutil.which(program) is None]:
            raise UserError(f"--executor slurm: there is no {missing[0]} here; run this where jobs are submitted")
        self._parameters = dict(parameters)
        self.running: dict[str, Job] = {}
        self._ids: dict[str, str] = {}
        self._looked = 0.0

    def find(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of `jobs` that an earlier driver submitted and that are queued or run."""
        queue = self._queue()
        if queue is None:
            raise UserError("slurm: squeue does not answer, and says which jobs are there already; try again later")
        numbers = {folder: number for number, folder in queue.items()}
        for job in jobs:
            if number := numbers.get(_scripts(job)):
                self.running[job.key], self._ids[job.key] = job, number
        return list(self.running.values())

    def check(self, jobs: Iterable[Job]) -> None:
        """Slurm says itself what it cannot do."""

    def has_room(self, job: Job) -> bool:
        """Slurm has a queue."""
        return True

    def start(self, job: Job) -> None:
        """Submit it, behind the jobs that it needs."""
        used = job.resources
        executor = self._submitit.AutoExecutor(folder=str(_scripts(job)), cluster="slurm",
                                               slurm_max_num_timeout=FOR_EVER)
        needs = [self._ids[need] for need in job.needs if need in self._ids]
        extra = {"kill-on-invalid-dep": "yes", **self._parameters.get("slurm_additional_parameters", {})}
        if needs:
            extra["dependency"] = "afterok:" + ":".join(needs)
        gpus = self._parameters.get("gpus_per_node", used.ranks)
        given = {key: value for key, value in self._parameters.items()
                 if key not in ("slurm_additional_parameters", "gpus_per_node")}
        try:
            executor.update_parameters(**{
                "name": job.key.replace("/", "."), "nodes": used.nodes, "tasks_per_node": used.ranks,
                **({"gpus_per_node": gpus} if gpus else {}), **given, "slurm_additional_parameters": extra})
            checkpoints = str(job.run / "checkpoints") if job.run else None
            submitted = executor.submit(Task(job.words, str(job.folder), checkpoints))
        except (ValueError, NameError, self._submitit.core.utils.FailedJobError,
                self._submitit.core.utils.FailedSubmissionError) as error:
            raise UserError(f"slurm: {job.key} cannot be submitted: {' '.join(str(error).split())}") from None
        self.running[job.key], self._ids[job.key] = job, submitted.job_id

    def ended(self) -> list[tuple[Job, int | None]]:
        """Jobs that Slurm knows no more; looks at most every `SECONDS`."""
        if not self.running or time.monotonic() - self._looked < SECONDS:
            return []
        queue = self._queue()
        if queue is None:  # nobody knows, so nothing has ended
            return []
        found = [(job, None) for key, job in self.running.items() if self._ids[key] not in queue]
        for job, _ in found:
            del self.running[job.key], self._ids[job.key]
        return found

    def stop(self, number: int) -> str:
        """Leave the jobs to Slurm."""
        numbers = " ".join(self._ids.values())
        self.running.clear()
        return f"its jobs stay with Slurm (scancel {numbers} ends them)"

    def _queue(self) -> dict[str, Path] | None:
        """Of this user's jobs that are queued or run: number -> folder of the batch script. None: no answer."""
        self._looked = time.monotonic()
        done = subprocess.run(["squeue", "--noheader", "--me", "--format=%A %o"], capture_output=True, text=True)
        if done.returncode:
            return None
        words = [line.partition(" ") for line in done.stdout.splitlines()]
        return {number: Path(script.strip()).parent for number, _, script in words}


def _scripts(job: Job) -> Path:
    """Where submitit puts what it needs for the job."""
    return (job.folder / "slurm").absolute()
