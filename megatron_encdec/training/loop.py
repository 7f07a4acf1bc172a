"""The training loop. A run is a list of phases over one trunk; a phase changes what it declares and nothing else.

Within a step: train, then the hooks in their order: evaluation, phase end, stop, checkpoint (metrics made durable
first). So a checkpoint at a boundary belongs to the finished phase, and a run that stops anywhere continues as if it
had not.
"""

from megatron_encdec.engine.optimizer import reset_moments
from megatron_encdec.platform.watchdog import LONG, mark
from megatron_encdec.training.job import Job


def train(job: Job) -> None:
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
