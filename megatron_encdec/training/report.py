"""Everything a step leaves behind for people: metrics.jsonl, trackers, the progress line."""

import math
import sys
import time

from megatron_encdec.engine.integrity import listed
from megatron_encdec.engine.saver import SaveEvent
from megatron_encdec.model.flops import training_flops
from megatron_encdec.platform.device import peak_flops
from megatron_encdec.platform.errors import as_line
from megatron_encdec.platform.optional import is_available
from megatron_encdec.platform.progress import Progress
from megatron_encdec.rundir.lock import Claim
from megatron_encdec.rundir.metrics import MetricsLog
from megatron_encdec.training.pace import EVALUATING, SAVING, Pace
from megatron_encdec.training.state import Run
from megatron_encdec.training.step import StepResult
from megatron_encdec.training.stretches import Stretch
from megatron_encdec.training.trackers import HURRY, PATIENCE, Trackers

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


class Report:
    """Made on every rank; one of them writes and speaks.
    A line that the disk has no room for is held back and written with the next one; training goes on meanwhile. Nothing
    is written or said of the run once another launch has taken its directory (`claim`).
    `save_failed`: the newest save has. `metrics_safe`: every line so far is on disk for good."""

    def __init__(self, run: Run, last: int, log: MetricsLog | None, claim: Claim, lock_note: str | None = None,
                 live: bool = False):
        """live: with a curve of the phase's loss in the progress line."""
        self._run, self._last, self._log, self._claim = run, last, log, claim
        settings = run.plan.config.logging
        self._every, self._speaks = settings.every, run.topology.rank == 0
        self._peak = peak_flops(run.plan.dtype) * run.topology.world_size
        self._live = live and (BLOCKS if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII_BLOCKS)
        self._progress = Progress("step", last, self._speaks, run.step, counts=True, stream=sys.stdout)
        self._pace = Pace(run.plan.timeline, run.plan.train, run.step, last)
        self.save_failed, self.metrics_safe = False, True
        for note in filter(None, (lock_note, *(log.notes if log else ()), *map(as_line, run.plan.notes),
                                  run.distance and run.distance.note)):
            self.say(note)
        for key, (then, now) in run.origin.changed.items():
            self.say(f"changed: {key}: {then!r} -> {now!r}")
        if run.origin.kind != "new":
            self._begin(last)
        names = settings.trackers
        if names is None:
            names = ("tensorboard",) if is_available("tensorboard") else ()
        self._trackers = Trackers(names if self._speaks and run.step < last else (), run.directory, run.step, self.say)
        self._clock = time.perf_counter()

    def _begin(self, last: int) -> None:
        """The resume line: from where, what changed since, what was passed over."""
        run, origin = self._run, self._run.origin
        if origin.fallback:
            self.say(f"{origin.fallback['damaged']}: {origin.fallback['problems'][0]}; "
                     f"continuing from {origin.fallback['used']} instead")
        if origin.later:
            self.say(f"checkpoints of later steps are here: {listed(origin.later)}; each is replaced when the run gets "
                     "to its step")
        if origin.kind == "resume" and self._log and run.step not in self._log.checkpoint_steps:
            # killed before its line
            self._write("checkpoint", step=run.step, phase=run.stretch.name, tokens=run.tokens)
        from_ = f" from {origin.checkpoint}" if origin.parent else ""
        self.say((f"continuing{from_} at step {run.step} of {run.plan.timeline.total_steps}"
                  if origin.kind != "weights" else f"beginning with the weights of {origin.checkpoint}")
                 + ("; nothing is left to do" if run.step >= last else ""))
        if run.step < last:
            extra = {name: value for name in ("changed", "parent", "fallback") if (value := getattr(origin, name))}
            self._write("resume", step=run.step, tokens=run.tokens, samples=run.samples, targets=run.targets,
                        topology=run.topology.as_dict(), **extra)

    def train(self, stretch: Stretch, result: StepResult, lr: float, nonfinite: dict | None) -> None:
        """The line of a step; speed counts this step alone, without evaluation and checkpoints before it.
        nonfinite: what was found in a step that was skipped; such a step always has its line."""
        run, tokens = self._run, stretch.tokens_per_step
        before, self._clock = self._clock, time.perf_counter()
        self._pace.step(stretch, result.seconds_waited)
        speed = tokens / (self._clock - before)
        flops = training_flops(run.plan.config.model, tokens, result.pairs, result.targets, stretch.freeze)
        mfu = speed * flops / tokens / self._peak
        loss, norm = (result.loss, result.grad_norm) if nonfinite is None else (None, None)
        if run.step % self._every == 0 or run.step in run.plan.timeline.phase_ends or nonfinite:
            self._write("train", step=run.step, phase=stretch.name, objective=run.objective.name, loss=loss,
                        lr=lr, grad_norm=norm, tokens=run.tokens, samples=run.samples, targets=run.targets,
                        tokens_per_second=speed, tokens_per_second_per_device=speed / run.topology.world_size,
                        mfu=mfu, **({"nonfinite": nonfinite} if nonfinite else {}))
            self._track({"train/loss": loss, f"train/loss_{run.objective.name}": loss, "train/lr": lr,
                         "train/grad_norm": norm, "train/tokens_per_second": speed, "train/mfu": mfu})
        if nonfinite:
            self.say(f"step {run.step}  SKIPPED: loss {nonfinite['loss']}, gradient norm {nonfinite['grad_norm']}, "
                     f"samples {nonfinite['samples'][0]}..{nonfinite['samples'][1]}; "
                     f"{run.skipped} of at most {run.plan.config.run.max_skipped}")
        if not self._speaks:
            return
        shown = "no target" if loss is None else f"loss {loss:.4f}"
        if self._live:
            shown += f" {self._pace.curve(stretch.name, run.objective.name, loss, self._live)}"
        self._progress.update(run.step, f"{stretch.name}  {shown}  {speed:,.0f} tokens/s  MFU {mfu:.1%}  "
                              f"{self._pace.detail(run.step)}", run.step == self._last, self._pace.left(run.step))

    def evaluation(self, losses: dict[str, float | None], distance: dict[str, float] | None) -> None:
        run = self._run
        nonfinite = {name: f"{loss:g}" for name, loss in losses.items() if not math.isfinite(loss or 0.0)}
        self._write("eval", step=run.step, phase=run.stretch.name, losses=losses, tokens=run.tokens,
                    **({"distance": distance} if distance else {}), **({"nonfinite": nonfinite} if nonfinite else {}))
        self._track({**{f"distance/{part}": value for part, value in (distance or {}).items()},
                     **{f"validation/{name}": loss for name, loss in losses.items()}})
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        self.say(f"step {run.step}  validation  {shown}")
        self._pace.held(EVALUATING, time.perf_counter() - self._clock)
        self._clock = time.perf_counter()

    def phase_end(self, distance: dict[str, float] | None) -> None:
        run = self._run
        self._write("phase", step=run.step, phase=run.stretch.name, objective=run.objective.name,
                    tokens=run.tokens, samples=run.samples, targets=run.targets,
                    **({"distance": distance} if distance else {}))
        self.say(f"step {run.step}  end of phase {run.stretch.name}")

    def saves(self, events: list[SaveEvent]) -> None:
        """Checkpoints that are on disk now, or that could not be written; the last of what follows a step."""
        self._clock = time.perf_counter()
        for event in events:
            self.save_failed = event.error is not None
            self._pace.held(SAVING, event.seconds_blocked)
            if self._log and self._claim.lost():
                return
            state = event.state
            found = {"error": event.error} if event.error else {
                "bytes": event.bytes, "seconds_blocked": event.seconds_blocked, "seconds_total": event.seconds_total}
            self._write("checkpoint", step=state.step, phase=state.phase_name, tokens=state.tokens, **found)
            outcome = f"CHECKPOINT FAILED: {event.error}; the last good one is kept, training goes on"
            self.say(f"step {state.step}  {outcome if event.error else 'checkpoint saved'}")

    def position(self) -> dict | None:
        """Make metrics durable; how long the file is then, or None on the ranks without one."""
        if self._log is None:
            return None
        self._safely(self._log.sync)
        return self._log.position

    def say(self, line: str) -> None:
        self._progress.say(line)

    def close(self, hurry: bool = False) -> None:
        """End of this process's part of the run. hurry: trackers have little time for their last points."""
        if self._log:
            self._safely(self._log.close)
        self._trackers.close(HURRY if hurry else PATIENCE)
        self._progress.close()

    def _write(self, kind: str, **values) -> None:
        if self._log and not self._claim.lost():
            self._safely(lambda: self._log.write(kind, **values))

    def _track(self, values: dict[str, float | None]) -> None:
        """For the trackers: what is not None of the values of this step."""
        if self._trackers and not self._claim.lost():
            self._trackers.log(self._run.step, self._run.tokens, values)

    def _safely(self, work) -> None:
        """Do `work` on the log; a full disk is told once, and again when it is over."""
        try:
            work()
        except OSError as error:
            if self.metrics_safe:
                self.say(f"metrics.jsonl: {error.strerror}; its lines are held back until there is room")
            self.metrics_safe = False
            return
        if not self.metrics_safe:
            self.say("metrics.jsonl: there is room again; no line was lost")
        self.metrics_safe = True
