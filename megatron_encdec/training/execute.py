"""One launch of a run on one rank, from the lock on its directory to its exit code, and the training loop in it.

    1. `FolderLock`     the directory is ours; another launch is refused
    2. `origin.find`    rank 0 decides where the run goes on from; all ranks load it; its files are opened
    3. `train`          with a watchdog beside it; what is still being written at the end is waited for
    4. `Job.hooks`      after each step, in this order: evaluation, phase end, stop, checkpoint

A phase changes what it declares and nothing else. Metrics are made durable before a checkpoint. So a checkpoint at a
boundary belongs to the finished phase, and a run that stops anywhere continues as if it had not.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_encdec.engine.optimizer import reset_moments, whole_parameters
from megatron_encdec.engine.saver import SaveEvent
from megatron_encdec.platform.distributed import Control, Topology
from megatron_encdec.platform.errors import RunFailed, UserError
from megatron_encdec.platform.signals import StopSignals
from megatron_encdec.platform.watchdog import LONG, Watchdog, mark
from megatron_encdec.rundir.files import write_atomic
from megatron_encdec.rundir.lock import FolderLock
from megatron_encdec.rundir.metrics import MetricsLog
from megatron_encdec.training import origin
from megatron_encdec.training.nonfinite import Guard
from megatron_encdec.training.plan import Plan, resolved_yaml
from megatron_encdec.training.profiling import Profiler
from megatron_encdec.training.report import Report
from megatron_encdec.training.state import Run, start
from megatron_encdec.training.stop import Stopper, TimeLimit


@dataclass(frozen=True)
class Options:
    """What the command line says of this launch alone: stop after step `until`; `fallback` from a damaged
    checkpoint; `time_limit` seconds since `started` (time.time()); the steps to `profile`."""

    until: int | None = None
    fallback: bool = False
    time_limit: float | None = None
    started: float = 0.0
    profile: range = range(0)


def _open(run: Run) -> MetricsLog:
    """config.yaml of the run directory, as this launch has it, and metrics.jsonl, as far as the run has come."""
    path = run.directory / "metrics.jsonl"
    known = (run.step, run.origin.state.metrics_position) if run.origin.kind == "resume" else ()
    try:
        log = MetricsLog(path, *known)
        write_atomic(run.directory / "config.yaml", resolved_yaml(run.plan.config))
    except OSError as error:
        name = error.filename2 or error.filename or path
        raise UserError(f"run.dir: {name} cannot be written ({error.strerror})") from None
    return log


def execute(plan: Plan, topology: Topology, options: Options, signals: StopSignals | None = None) -> int:
    """Run `plan` on all ranks; the exit code.
    Raises `AgreedError` for a mistake, `RunFailed` where training cannot go on: the same on all ranks."""
    settings = plan.config.run
    control = Control(settings.hang_timeout + LONG)
    watchdog = Watchdog(control, settings.hang_timeout)
    with contextlib.ExitStack() as stack:
        stack.callback(watchdog.close)
        note = control.from_first(lambda: stack.enter_context(FolderLock(settings.dir)).note)
        mark("looking for a checkpoint", limit=LONG)
        run = start(plan, topology, control.from_first(lambda: origin.find(plan, options.fallback)))
        logs: list[MetricsLog] = []  # one on rank 0, none elsewhere
        control.from_first(lambda: logs.append(_open(run)))
        last = min(plan.timeline.total_steps, options.until or plan.timeline.total_steps)
        limit = TimeLimit(options.time_limit, options.started, run.bytes_to_save) if options.time_limit else None
        report = Report(run, last, logs[0] if logs else None, note)
        profiler = Profiler(options.profile, run.directory / "profile", topology.rank, report.say)
        job = Job(run, report, Guard(control, settings), Stopper(control, signals, limit), profiler, last)
        try:
            train(job)
        except RunFailed:
            job.tell_saves(run.saver.wait())  # a good state from before, still on its way to the disk
            job.report.close()
            raise
        return job.finish()


def train(job: "Job") -> None:
    """Run `job.run` from where it stands to `job.last`, or until something asks it to stop."""
    run, timeline = job.run, job.run.plan.timeline
    hooks = job.hooks()
    job.stopper.agree_now()
    job.profiler.after(run.step)
    while run.step < job.last and not job.stopper.reason:
        step = run.step + 1
        mark(f"step {step}")
        stretch = timeline.at(step)
        if step == stretch.start + 1 and stretch.optimizer_state == "reset":
            reset_moments(run.trainer.optimizer)
        lr = stretch.learning_rate(step)
        result = run.trainer.train_step(run.plan.train, stretch.objective, stretch.samples(step), lr)
        nonfinite = job.guard.judge(step, result, run.skipped)
        run.count(step, result)
        job.report.train(stretch, result, lr, nonfinite)
        for hook in hooks:
            hook.after(step)
    job.profiler.close(run.step)
    mark("waiting for the last checkpoint", limit=LONG)
    job.tell_saves(run.saver.wait())


@dataclass(frozen=True)
class Every:
    """A hook: `do` after every `steps`-th step (0: none of them), and after the steps `also`."""

    steps: int
    do: Callable[[], None]
    also: frozenset[int] = frozenset()

    def after(self, step: int) -> None:
        if step in self.also or (self.steps and step % self.steps == 0):
            self.do()


@dataclass
class Job:
    """A run with what watches over it; `last` is the step to end at."""

    run: Run
    report: Report
    guard: Guard
    stopper: Stopper
    profiler: Profiler
    last: int

    def hooks(self) -> list[Every]:
        """What happens after a step, in this order."""
        config, ends = self.run.plan.config, frozenset(self.run.plan.timeline.phase_ends)
        evaluation = [Every(config.evaluation.every, self.evaluate, ends)] if self.run.plan.validation else []
        return [Every(1, lambda: self.profiler.after(self.run.step)), *evaluation,
                Every(0, self.report.phase_end, ends), Every(1, self.stop_if_asked),
                Every(config.checkpoint.every, self.save, ends | {self.last}),
                Every(1, lambda: self.tell_saves(self.run.saver.poll()))]

    def evaluate(self) -> None:
        """Validation loss under every evaluated objective, whichever one is being trained."""
        run = self.run
        mark(f"evaluating after step {run.step}")
        windows = run.plan.config.evaluation.batches * run.plan.config.batch.global_size
        self.report.evaluation({name: run.trainer.evaluate(run.plan.validation, objective, windows).loss
                                for name, objective in run.plan.evaluated.items()})

    def stop_if_asked(self) -> None:
        """Save where the ranks agree to stop."""
        self.stopper.agree()
        if self.stopper.reason:
            self.save()

    def save(self) -> None:
        """Begin a checkpoint of the current step, if it is not there yet and its weights are finite."""
        if self.run.saved_step == self.run.step:
            return
        whole_parameters(self.run.trainer.ddp)
        self.guard.check_weights(self.run.trainer.trunk, self.run.step)
        self.run.save(self.report.position())

    def tell_saves(self, events: list[SaveEvent]) -> None:
        self.report.saves(events)
        for event in events:
            self.stopper.saved(event.seconds_total)

    def finish(self) -> int:
        """Say how it ended; the exit code."""
        run, total = self.run, self.run.plan.timeline.total_steps
        if self.stopper.reason:
            kept = "checkpoint saved" if run.saved_step == run.step else "nothing was to be saved"
            kept = "its checkpoint could NOT be saved" if self.report.save_failed else kept
            self.report.say(f"{self.stopper.reason} after step {run.step} of {total}, {kept}; the same command goes on "
                            "from there")
        self.report.close()
        if self.report.save_failed or not self.report.metrics_safe:
            what = "the last checkpoint" if self.report.save_failed else "metrics.jsonl"
            raise RunFailed(f"{run.directory}: {what} could not be written; make room and give the same command "
                            f"again: it goes on from the last good checkpoint, not from step {run.step}")
        return 0
