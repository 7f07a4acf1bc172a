"""The training loop. A run is a list of phases over one trunk; a phase changes the objective and nothing else.

Within a step: train, evaluation, phase end, metrics made durable, then the checkpoint. So a checkpoint at a
boundary belongs to the finished phase, and a run that stops anywhere continues as if it had not.
"""

from megatron_encdec.engine.optimizer import reset_moments
from megatron_encdec.platform.watchdog import LONG, mark
from megatron_encdec.training.job import Job
from megatron_encdec.training.state import Run


def train(job: Job) -> None:
    """Run `job.run` from where it stands to `job.last`, or until something asks it to stop."""
    run, report, stopper = job.run, job.report, job.stopper
    plan, timeline, config = run.plan, run.plan.timeline, run.plan.config
    stopper.agree(may_time_out=False)
    while run.step < job.last and not stopper.reason:
        step = run.step + 1
        mark(f"step {step}")
        phase = timeline.at(step)
        if step == phase.start + 1 and phase.optimizer_state == "reset":
            reset_moments(run.engine.optimizer)

        lr = timeline.learning_rate(step)
        job.profiler.begins(step)
        result = run.engine.train_step(plan.train, plan.objectives[phase.index], step, lr)
        job.tell(job.profiler.ended(step))
        nonfinite = job.guard.judge(step, result, run.skipped)
        run.count(step, result)
        report.train(phase, result, lr, nonfinite)

        if plan.validation and (step % config.evaluation.every == 0 or step == phase.end):
            report.evaluation(phase, evaluate(run))
        if step == phase.end:
            report.phase_end(phase)
        stopper.agree()
        if step % config.checkpoint.every == 0 or step in (phase.end, job.last) or stopper.reason:
            job.save(suspect=not result.finite)
        job.tell_saves(run.saver.poll())
    job.tell(job.profiler.close(run.step))
    mark("waiting for the last checkpoint", limit=LONG)
    job.tell_saves(run.saver.wait())


def evaluate(run: Run) -> dict[str, float | None]:
    """Validation loss under every evaluated objective, whichever one is being trained."""
    mark(f"evaluating after step {run.step}")
    windows = run.plan.config.evaluation.batches * run.plan.config.batch.global_size
    return {name: run.engine.evaluate(run.plan.validation, objective, windows).loss
            for name, objective in run.plan.evaluated.items()}
