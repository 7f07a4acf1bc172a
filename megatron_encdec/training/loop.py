"""The training loop. A run is a list of phases over one trunk; a phase changes the objective and nothing else.

Within a step: train, evaluation, phase end, metrics made durable, then the checkpoint. So a checkpoint at a
boundary belongs to the finished phase, and a run that stops anywhere continues as if it had not.
"""

import time

from megatron_encdec.engine.optimizer import reset_moments
from megatron_encdec.model.flops import training_flops_per_token
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.platform.peak import peak_flops
from megatron_encdec.rundir.metrics import MetricsLog
from megatron_encdec.training.phases import Phase, tokens_per_step
from megatron_encdec.training.plan import Plan
from megatron_encdec.training.progress import TensorBoard, TrainingProgress
from megatron_encdec.training.state import Run, start
from megatron_encdec.training.step import StepResult


def train(plan: Plan, topology: Topology, until: int | None = None) -> Run:
    """Run `plan` from where it stands to its end, or to step `until`."""
    run = start(plan, topology)
    timeline, config = plan.timeline, plan.config
    last = min(timeline.total_steps, until or timeline.total_steps)
    report = Report(run, last)
    while run.step < last:
        step = run.step + 1
        phase = timeline.at(step)
        if step == phase.start + 1 and phase.optimizer_state == "reset":
            reset_moments(run.engine.optimizer)

        lr = timeline.learning_rate(step)
        result = run.engine.train_step(plan.train, plan.objectives[phase.index], step, lr)
        run.step, run.targets = step, run.targets + result.targets
        report.train(phase, result, lr)

        if plan.validation and (step % config.evaluation.every == 0 or step == phase.end):
            report.evaluation(phase, evaluate(run))
        if step == phase.end:
            report.phase_end(phase)
        if step % config.checkpoint.every == 0 or step in (phase.end, last):
            report.sync()
            run.save()
            report.checkpoint(phase)
    report.close()
    return run


def evaluate(run: Run) -> dict[str, float | None]:
    """Validation loss under every evaluated objective, whichever one is being trained."""
    windows = run.plan.config.evaluation.batches * run.plan.config.batch.global_size
    return {name: run.engine.evaluate(run.plan.validation, objective, windows).loss
            for name, objective in run.plan.evaluated.items()}


class Report:
    """Everything a step leaves behind for people: metrics.jsonl, TensorBoard, the progress line."""

    def __init__(self, run: Run, last: int):
        self._run, config = run, run.plan.config
        self._tokens_per_step = tokens_per_step(config)
        self._every = config.logging.every
        self._peak = peak_flops(run.plan.dtype) * run.topology.world_size
        self._progress = TrainingProgress(last, run.step, run.reports)
        self._log = MetricsLog(run.directory / "metrics.jsonl", run.step) if run.reports else None
        self._board = TensorBoard(run.directory / "tensorboard", run.reports and config.logging.tensorboard)
        for note in run.plan.notes:
            self._progress.say(f"note: {note}")
        if run.step:
            self._progress.say(f"continuing from step {run.step} of {run.plan.timeline.total_steps}"
                               + ("; nothing is left to do" if run.step >= last else ""))
            if run.step < last:
                self._write("resume", step=run.step, topology=run.topology.as_dict())
        self._clock = time.perf_counter()

    def train(self, phase: Phase, result: StepResult, lr: float) -> None:
        """The line of a step; speed counts this step alone, without evaluation and checkpoints before it."""
        run = self._run
        now = time.perf_counter()
        speed = self._tokens_per_step / (now - self._clock)
        self._clock = now
        model, objective = run.plan.config.model, run.plan.objectives[phase.index]
        flops = training_flops_per_token(model, run.plan.config.data.sequence_length, objective.attention,
                                         result.targets / self._tokens_per_step)
        if run.step % self._every == 0 or run.step == phase.end:
            self._write("train", step=run.step, phase=phase.name, objective=objective.name, loss=result.loss, lr=lr,
                        grad_norm=result.grad_norm, tokens=run.tokens, samples=run.samples, targets=run.targets,
                        tokens_per_second=speed, mfu=speed * flops / self._peak)
            self._board.write(run.step, train__loss=result.loss, train__lr=lr, train__grad_norm=result.grad_norm,
                              train__tokens_per_second=speed)
        loss = "no target" if result.loss is None else f"loss {result.loss:.4f}"
        self._progress.step(run.step, phase.name, f"{loss}  {speed:,.0f} tokens/s")

    def evaluation(self, phase: Phase, losses: dict[str, float | None]) -> None:
        """Validation losses by objective."""
        self._write("eval", step=self._run.step, phase=phase.name, losses=losses, tokens=self._run.tokens)
        self._board.write(self._run.step, **{f"validation__{name}": loss for name, loss in losses.items()})
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        self._progress.say(f"step {self._run.step}  validation  {shown}")
        self._clock = time.perf_counter()

    def phase_end(self, phase: Phase) -> None:
        """A phase is over."""
        self._write("phase", step=self._run.step, phase=phase.name, objective=phase.objective.name,
                    tokens=self._run.tokens, samples=self._run.samples, targets=self._run.targets)
        self._progress.say(f"step {self._run.step}  end of phase {phase.name}")

    def checkpoint(self, phase: Phase) -> None:
        """A checkpoint is on disk."""
        self._write("checkpoint", step=self._run.step, phase=phase.name, tokens=self._run.tokens)
        self._progress.say(f"step {self._run.step}  checkpoint saved")
        self._clock = time.perf_counter()

    def sync(self) -> None:
        """Make metrics durable."""
        if self._log:
            self._log.sync()

    def close(self) -> None:
        """End of this process's part of the run."""
        if self._log:
            self._log.close()
        self._board.close()
        self._progress.close()

    def _write(self, kind: str, **values) -> None:
        if self._log:
            self._log.write(kind, **values)
