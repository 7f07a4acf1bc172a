"""The training loop, and what hangs on it. A phase changes what it declares and nothing else.

Within a step: train, then the hooks in their order: evaluation, phase end, stop, checkpoint (metrics made durable
first). So a checkpoint at a boundary belongs to the finished phase, and a run that stops anywhere continues as if it
had not.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_encdec.engine.optimizer import freeze, reset_moments, whole_parameters
from megatron_encdec.engine.saver import SaveEvent
from megatron_encdec.platform.errors import RunFailed, stopped_code
from megatron_encdec.platform.watchdog import LONG, mark
from megatron_encdec.training.nonfinite import Guard
from megatron_encdec.training.profiling import Profiler
from megatron_encdec.training.report import Report
from megatron_encdec.training.state import Run
from megatron_encdec.training.stop import Stopper


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
        if step == stretch.phase_start + 1 and run.distance:
            run.distance.begin()
        freeze(run.trainer.ddp, run.trainer.optimizer, stretch.freeze)
        lr = stretch.learning_rate(step)
        result = run.trainer.train_step(run.plan.work(step), lr)
        nonfinite = job.guard.judge(step, result, run.skipped)
        run.count(step, result)
        job.report.train(stretch, result, lr, nonfinite)
        for hook in hooks:
            hook.after(step)
    job.profiler.close(run.step)
    mark("waiting for the last checkpoint", limit=LONG)
    job.tell_saves(run.saver.wait())
    job.stopper.check_claim()


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
                Every(0, lambda: self.report.phase_end(self.distance()), ends), Every(1, self.stop_if_asked),
                Every(config.checkpoint.every, self.save, ends | {self.last, *config.checkpoint.steps}),
                Every(1, lambda: self.tell_saves(self.run.saver.poll()))]

    def evaluate(self) -> None:
        """Validation loss under every evaluated objective, whichever one is being trained."""
        run = self.run
        mark(f"evaluating after step {run.step}")
        self.report.evaluation({name: run.trainer.evaluate(run.plan.validation_work(objective, run.stretch)).loss
                                for name, objective in run.plan.evaluated.items()}, self.distance())

    def distance(self) -> dict[str, float] | None:
        """Of each part of the trunk from the phase's first weights, if asked for."""
        if self.run.distance is None:
            return None
        whole_parameters(self.run.trainer.ddp)
        return self.run.distance.measure()

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
        """Say how it ended; the exit code. `RunFailed` where something could not be written."""
        run, total = self.run, self.run.plan.timeline.total_steps
        if self.stopper.reason:
            kept = "checkpoint saved" if run.saved_step == run.step else "nothing was to be saved"
            kept = "its checkpoint could NOT be saved" if self.report.save_failed else kept
            self.report.say(f"{self.stopper.reason} after step {run.step} of {total}, {kept}; the same command goes on "
                            "from there")
        self.report.close(hurry=self.stopper.reason is not None)
        if self.report.save_failed or not self.report.metrics_safe:
            what = "the last checkpoint" if self.report.save_failed else "metrics.jsonl"
            raise RunFailed(f"{run.directory}: {what} could not be written; make room and give the same command "
                            f"again: it goes on from the last good checkpoint, not from step {run.step}")
        return stopped_code() if self.stopper.reason and run.step < total else 0
