"""A run together with what watches over it; the loop works on this."""

from dataclasses import dataclass

from megatron_encdec.engine.saver import SaveEvent
from megatron_encdec.platform.errors import RunFailed
from megatron_encdec.training.nonfinite import Guard
from megatron_encdec.training.profiling import Profiler
from megatron_encdec.training.report import Report
from megatron_encdec.training.state import Run
from megatron_encdec.training.stop import Stopper


@dataclass
class Job:
    """A run with what watches over it; `last` is the step to end at."""

    run: Run
    report: Report
    guard: Guard
    stopper: Stopper
    profiler: Profiler
    last: int

    def save(self, suspect: bool) -> None:
        """Begin a checkpoint of the current step, if its weights are finite."""
        self.run.engine.state_is_whole()
        self.guard.check_weights(self.run.engine.trunk, self.run.step)
        self.run.save(self.report.position(), suspect)

    def tell(self, line: str | None) -> None:
        """Say `line`, if there is one."""
        if line:
            self.report.say(line)

    def tell_saves(self, events: list[SaveEvent]) -> None:
        """Report finished saves."""
        for event in self.report.saves(events):
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
