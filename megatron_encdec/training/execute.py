"""One launch of a run on one rank, from the lock on its directory to its exit code.

    1. `FolderLock`     the directory is ours, and all ranks see it; another launch is refused
    2. `origin.find`    rank 0 decides where the run goes on from; all ranks load it; its files are opened
    3. `train`          with a watchdog beside it (loop.py); what is still being written at the end is waited for
"""

import contextlib
from dataclasses import dataclass

from megatron_encdec.platform.distributed import Control, Topology
from megatron_encdec.platform.errors import RunFailed, UserError, say, stopped_code
from megatron_encdec.platform.signals import StopSignals
from megatron_encdec.platform.watchdog import LONG, Watchdog, mark
from megatron_encdec.rundir.failure import forget_failure, noted_failure
from megatron_encdec.rundir.files import write_atomic
from megatron_encdec.rundir.lock import Claim, FolderLock, InUse
from megatron_encdec.rundir.metrics import MetricsLog
from megatron_encdec.training import origin
from megatron_encdec.training.agreement import check_shared
from megatron_encdec.training.loop import Job, train
from megatron_encdec.training.nonfinite import Guard
from megatron_encdec.training.plan import Plan, resolved_yaml
from megatron_encdec.training.profiling import Profiler
from megatron_encdec.training.report import Report
from megatron_encdec.training.state import Run, start
from megatron_encdec.training.stop import Stopper, TimeLimit


@dataclass(frozen=True)
class Options:
    """What the command line says of this launch alone: stop after step `until`; `fallback` from a damaged
    checkpoint; `time_limit` seconds since `started` (time.time()); the steps to `profile`; `live`: a curve of the loss
    in the progress line."""

    until: int | None = None
    fallback: bool = False
    time_limit: float | None = None
    started: float = 0.0
    profile: range = range(0)
    live: bool = False


def _open(run: Run) -> MetricsLog:
    """config.yaml of the run directory, as this launch has it, and metrics.jsonl, as far as the run has come. How an
    earlier launch failed is forgotten."""
    path = run.directory / "metrics.jsonl"
    known = (run.step, run.origin.state.metrics_position) if run.origin.kind == "resume" else ()
    try:
        log = MetricsLog(path, *known)
        forget_failure(run.directory)
        write_atomic(run.directory / "config.yaml", resolved_yaml(run.plan.config))
    except OSError as error:
        name = error.filename2 or error.filename or path
        raise UserError(f"run.dir: {name} cannot be written ({error.strerror})") from None
    return log


def _lock(directory: str, signals: StopSignals | None, stack: contextlib.ExitStack) -> tuple[Claim | None, str | None]:
    """The claim on the run directory until `stack` ends, and what to say of it; no claim where a signal came first."""
    def asked_to_stop() -> bool:
        return signals is not None and signals.received is not None

    try:
        lock = stack.enter_context(FolderLock(directory, stop=asked_to_stop))
    except InUse:
        if asked_to_stop():
            return None, "stopped while another launch held the run directory; nothing was to be saved"
        raise
    return lock.claim, lock.note


def execute(plan: Plan, topology: Topology, options: Options, signals: StopSignals | None = None) -> int:
    """Run `plan` on all ranks; the exit code.
    Raises `AgreedError` for a mistake, `RunFailed` where training cannot go on: the same on all ranks."""
    settings = plan.config.run
    control = Control(settings.hang_timeout + LONG)
    watchdog = Watchdog(control, settings.hang_timeout)
    with contextlib.ExitStack() as stack:
        stack.callback(watchdog.close)
        mark("taking the run directory", limit=LONG)
        claim, note = control.from_first(lambda: _lock(settings.dir, signals, stack))
        if claim is None:
            if topology.rank == 0:
                print(note)
            return stopped_code()
        check_shared(claim, control, settings.dir)
        mark("looking for a checkpoint", limit=LONG)
        run = start(plan, topology, control.from_first(lambda: origin.find(plan, options.fallback)), claim)
        logs: list[MetricsLog] = []  # one on rank 0, none elsewhere
        control.from_first(lambda: logs.append(_open(run)))
        last = min(plan.timeline.total_steps, options.until or plan.timeline.total_steps)
        limit = TimeLimit(options.time_limit, options.started, run.bytes_to_save) if options.time_limit else None
        report = Report(run, last, logs[0] if logs else None, claim, note, options.live)
        stopper = Stopper(control, signals, limit, claim=claim if logs else None)
        profiler = Profiler(options.profile, run.directory / "profile", topology.rank, report.say)
        job = Job(run, report, Guard(control, settings), stopper, profiler, last)
        with noted_failure(run.directory, claim, lambda: run.step) if logs else contextlib.nullcontext():
            try:
                train(job)
            except RunFailed as failure:
                say(failure)
                job.tell_saves(run.saver.wait())  # a good state from before, still on its way to the disk
                job.report.close()
                raise
            return job.finish()
