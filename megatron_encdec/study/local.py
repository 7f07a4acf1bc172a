"""Jobs as processes of this machine, which outlive the driver and are found again.

A job holds the flock of `lock` in its folder from before it starts until its last process has ended: the file is opened
and locked here, and inherited. So whoever finds the lock taken knows that the job runs, whoever started it.

    1. `start(job)`     in a session of its own: Ctrl-C at the driver's terminal does not reach it
    2. `ended()`        jobs that have ended since the last call, with their exit codes where those are known
    3. `stop(number)`   a signal to all of them

Why not submitit's local executor: it has no queue, ends jobs after minutes, and cannot find them after a restart.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_encdec.platform.children import on_cores
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.study.jobs import Job

SECONDS = 0.2  # between two looks at jobs that are to end


class LocalExecutor:
    """At most `places` jobs at a time; each rank of one gets a GPU of its own where there are `gpus`. Where there are
    none, each job gets its share of the cores: two with as many threads as there are cores take ten times as long."""

    waits_itself = False  # a job is started when those that it needs have ended

    def __init__(self, places: int, gpus: list[str]):
        self._places, self._gpus = places, gpus
        self._shares = [] if gpus else shares_of_cores(places)
        self.running: dict[str, Job] = {}
        self._processes: dict[str, subprocess.Popen | None] = {}  # None: started by an earlier driver
        self._taken: dict[str, dict[str, list]] = {}  # `gpus` and `cores` of each that runs

    def check(self, jobs: Iterable[Job]) -> None:
        """Raises `UserError` where one of `jobs` could never run here."""
        for job in jobs:
            used = job.resources
            if used.nodes > 1:
                raise UserError(f"{job.key}: resources ask for {used.nodes} nodes; this executor has one machine: "
                                "--executor slurm, or other resources")
            if self._gpus and used.ranks > len(self._gpus):
                raise UserError(f"{job.key}: resources ask for {used.ranks} ranks; there are {len(self._gpus)} GPUs")

    def find(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of `jobs` that an earlier driver started and that still run; they count as running here."""
        found = []
        for job in jobs:
            if is_running(job.folder):
                self._watch(job, None, _record(job.folder))
                found.append(job)
        return found

    def _watch(self, job: Job, process: subprocess.Popen | None, taken: dict[str, Any]) -> None:
        self.running[job.key], self._processes[job.key], self._taken[job.key] = job, process, taken

    def has_room(self, job: Job) -> bool:
        """Whether it can start now."""
        return len(self.running) < self._places and (not self._gpus or len(self._free()) >= job.resources.ranks)

    def _free(self) -> list[str]:
        taken = {gpu for used in self._taken.values() for gpu in used.get("gpus", [])}
        return [gpu for gpu in self._gpus if gpu not in taken]

    def _cores(self) -> list[int]:
        """The share that fewest of the running jobs have; nothing where jobs have GPUs."""
        taken = [used.get("cores") for used in self._taken.values()]
        return min(self._shares, key=taken.count, default=[])

    def start(self, job: Job) -> None:
        """Start it; what it prints is added to `log.txt` of its folder."""
        taken = {"gpus": self._free()[: job.resources.ranks], "cores": self._cores()}
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        if taken["gpus"]:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken["gpus"])
        lock = _lock(job.folder)
        if lock is None:  # one of an earlier driver, or a process of it that is slow to go
            self._watch(job, None, _record(job.folder))
            return
        try:
            with open(job.folder / "log.txt", "ab") as log, on_cores(taken["cores"]):
                process = subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                           pass_fds=(lock,), start_new_session=True, env=environment)
            write_json_atomic(job.folder / "job.json", {"pid": process.pid, **taken, "command": job.command})
        finally:
            os.close(lock)
        self._watch(job, process, taken)

    def ended(self) -> list[tuple[Job, int | None]]:
        """Jobs that have ended since the last call; the exit code is None for one of an earlier driver."""
        found = []
        for key, job in list(self.running.items()):
            process = self._processes[key]
            if process is not None and process.poll() is None:
                continue
            if is_running(job.folder):
                continue  # one of its processes is still there
            del self.running[key], self._processes[key], self._taken[key]
            found.append((job, process and process.returncode))
        return found

    def stop(self, number: int) -> str:
        """Send a signal to all that run, and wait for their ends; in words, what became of them."""
        for key, job in self.running.items():
            pid = process.pid if (process := self._processes[key]) else _record(job.folder).get("pid")
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(pid, number)
        while self.running:
            self.ended()
            time.sleep(SECONDS)
        return "its jobs have ended"


def shares_of_cores(places: int) -> list[list[int]]:
    """The cores of this process dealt out to so many jobs, at least one to each; nothing where all have all of them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if places == 1 or not cores:
        return []
    size = max(1, len(cores) // places)
    return [[cores[(place * size + one) % len(cores)] for one in range(size)] for place in range(places)]


def is_running(folder: Path) -> bool:
    """Whether a process of the job with this folder is there; asked without holding anything up."""
    try:
        with open(folder / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of the job's folder; None where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _record(folder: Path) -> dict:
    try:
        return json.loads((folder / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
