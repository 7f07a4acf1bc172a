"""Phases: from the lengths in the config to steps, and to the history that a state stands on.

    1. `lay_out(config)`          phases with first and last step; what does not fit is refused
    2. `Timeline.at(step)`        the phase and the learning rate of a step
    3. `Timeline.history(step)`   everything that determined the state after `step`, nothing later

Steps are optimizer updates counted from 1; phase k covers the steps start + 1 .. end.
"""

import hashlib
import math
import struct
from dataclasses import dataclass, replace

from megatron_encdec.engine.config import ScheduleSettings
from megatron_encdec.engine.schedule import learning_rate
from megatron_encdec.objectives import ObjectiveConfig
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import Config, PhaseSettings


@dataclass(frozen=True)
class Phase:
    """A phase with its place in the run."""

    index: int
    name: str
    objective: ObjectiveConfig
    start: int  # steps done before it
    end: int  # its last step
    optimizer_state: str
    schedule: ScheduleSettings | None


def tokens_per_step(config: Config) -> int:
    """Input tokens of one optimizer step."""
    return config.batch.global_size * config.data.sequence_length


def _length(phase: PhaseSettings, total: int | None, tokens_step: int) -> float:
    if phase.steps is not None:
        return phase.steps
    if phase.tokens is not None:
        return math.ceil(phase.tokens / tokens_step)
    if total is None:
        raise UserError(f"phases: {phase.name!r} is a fraction of the run, so run.total.steps or "
                        "run.total.tokens must be given")
    return phase.fraction * total


def lay_out(config: Config) -> list[Phase]:
    """The phases with their steps; their lengths must add up to `run.total` where that is given."""
    tokens_step = tokens_per_step(config)
    total = config.run.total.steps
    if config.run.total.tokens is not None:
        total = math.ceil(config.run.total.tokens / tokens_step)
    phases, position = [], 0.0
    for index, settings in enumerate(config.phases):
        start, position = round(position), position + _length(settings, total, tokens_step)
        phases.append(Phase(index, settings.name, settings.objective, start, round(position),
                            settings.optimizer_state, settings.schedule))
        if phases[-1].end <= start:
            raise UserError(f"phases.{index}: {settings.name!r} comes to less than one step of {tokens_step} tokens")
    if total is not None and abs(position - total) > 0.5:
        lengths = " + ".join(str(phase.end - phase.start) for phase in phases)
        raise UserError(f"phases: their steps {lengths} = {phases[-1].end} do not add up to the run's total of "
                        f"{total} steps; change the phases or run.total")
    schedules = [("schedule", config.schedule, phases[-1].end)] + [
        (f"phases.{phase.index}.schedule", phase.schedule, phase.end - phase.start)
        for phase in phases if phase.schedule]
    for where, schedule, steps in schedules:
        if schedule.warmup_steps + schedule.decay_steps > steps:
            raise UserError(f"{where}: warmup_steps={schedule.warmup_steps} + decay_steps={schedule.decay_steps} "
                            f"is more than its {steps} steps")
    return phases


def with_phase_steps(config: Config, phases: list[Phase]) -> Config:
    """The config with every phase's length, and the total, in steps."""
    settings = [replace(old, steps=phase.end - phase.start, tokens=None, fraction=None)
                for old, phase in zip(config.phases, phases, strict=True)]
    total = replace(config.run.total, steps=phases[-1].end, tokens=None)
    return replace(config, phases=settings, run=replace(config.run, total=total))


class Timeline:
    """The steps of a run: which phase, which learning rate, which history."""

    def __init__(self, config: Config, fingerprints: list[str], masking: dict | None = None,
                 weights: dict | None = None):
        """`fingerprints`: of the training sources, in the order of `data.train`; `masking`: what masked tokens
        depend on besides the objective (mask id, set of ordinary ids), part of the history of mlm phases only;
        `weights`: where the initial weights come from, if not from run.seed: step and history hash of another run."""
        self.config, self.fingerprints, self.masking, self.weights = config, fingerprints, masking, weights
        self.phases = lay_out(config)
        self.total_steps = self.phases[-1].end
        self._earlier: list[dict] = []  # precisions of steps that were done in another one, each `until` a step

    def at(self, step: int) -> Phase:
        """The phase that update `step` (1 .. total_steps) belongs to; the last one beyond the end."""
        return next((phase for phase in self.phases if step <= phase.end), self.phases[-1])

    def learning_rate(self, step: int) -> float:
        """Learning rate of update `step`: the run's schedule, or the phase's own."""
        phase, peak = self.at(step), self.config.optimizer.lr
        if phase.schedule is not None:
            return learning_rate(step - phase.start, phase.end - phase.start, peak, phase.schedule)
        return learning_rate(step, self.total_steps, peak, self.config.schedule)

    def adopt_precision(self, recorded: dict | list[dict], step: int) -> None:
        """Steps up to `step` were done in the `recorded` precision (of a history); what comes is the config's."""
        earlier = recorded if isinstance(recorded, list) else [recorded | {"until": step}]
        earlier = [*earlier[:-1], earlier[-1] | {"until": step}]
        now = self.config.precision.identity()
        if _without_until(earlier[-1]) == now:
            earlier = earlier[:-1]  # still going on
        self._earlier = earlier

    def _precision(self, step: int) -> dict | list[dict]:
        """Of the steps up to `step`: one, or all of them in order, where a resume has changed it."""
        past = [one for one in self._earlier if one["until"] < step]
        current = next((one for one in self._earlier if one["until"] >= step), self.config.precision.identity())
        if not past:
            return _without_until(current)
        return [*past, _without_until(current) | {"until": step}]

    def history(self, step: int) -> dict:
        """What determined the state after `step`; equal histories mean interchangeable states."""
        config = self.config
        data = schema.to_dict(config.data)
        optimizer = {key: value for key, value in schema.to_dict(config.optimizer).items() if key != "lr"}
        rates = hashlib.sha256()
        for number in range(1, step + 1):
            rates.update(struct.pack("<d", self.learning_rate(number)))
        return {
            "step": step,
            **({"weights": self.weights} if self.weights else {"run_seed": config.run.seed}),
            "data": {"sources": [{"fingerprint": fingerprint, "weight": source.weight} for fingerprint, source
                                 in zip(self.fingerprints, config.data.train, strict=True)],
                     **{key: data[key] for key in ("seed", "sequence_length", "isolate_documents",
                                                   "random_length")}},
            "model": config.model.identity(),
            "batch_global_size": config.batch.global_size,
            "optimizer": optimizer,
            "learning_rates": rates.hexdigest(),
            "precision": self._precision(step),
            "phases": [{"start": phase.start, "end": min(phase.end, step),
                        "objective": schema.to_dict(phase.objective), "optimizer_state": phase.optimizer_state,
                        "masking": self.masking if phase.objective.name == "mlm" else None}
                       for phase in self.phases if phase.start < step],
        }


def _without_until(precision: dict) -> dict:
    return {key: value for key, value in precision.items() if key != "until"}
