"""Stretches: what determines steps a..b of a run as one value, and the history that a state stands on.

    1. `lay_out(config)`            the phases as stretches with first and last step; what does not fit is refused
    2. `Timeline.history(step)`     what determined the state after `step`: the stretches up to it, the last cut there

Steps are optimizer updates counted from 1; a stretch covers the steps start + 1 .. end.
"""

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_encdec.data.config import DataConfig
from megatron_encdec.engine.config import OptimizerSettings, ScheduleSettings, learning_rate, learning_rates
from megatron_encdec.model.parts import Frozen
from megatron_encdec.objectives.base import Objective, Vocabulary
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import Config, PhaseSettings


@dataclass(frozen=True)
class Stretch:
    """Steps start + 1 .. end of a run, and all that determines them; `index` and `name` are those of the phase, which
    began after step `phase_start` and has `phase_steps` steps.
    first_sample: windows consumed before it. precision: its part of the history. The learning rate follows
    `schedule`, which began after step `schedule_start` and has `schedule_steps` steps."""

    index: int
    name: str
    start: int
    end: int
    phase_start: int
    phase_steps: int
    first_sample: int
    objective: Objective
    optimizer_state: str  # at its start: carry or reset
    data: DataConfig
    batch_size: int  # windows of a step
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    schedule_start: int
    schedule_steps: int
    precision: dict[str, Any]
    freeze: Frozen = Frozen()

    @property
    def steps(self) -> int:
        return self.end - self.start

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.sequence_length

    def samples(self, step: int) -> range:
        """Numbers of the windows that update `step` reads."""
        first = self.first_sample + (step - 1 - self.start) * self.batch_size
        return range(first, first + self.batch_size)

    def objective_at(self, step: int) -> Objective:
        """That of update `step`, all that changes from step to step settled."""
        return self.objective.at(step - self.phase_start, self.phase_steps)

    def learning_rate(self, step: int) -> float:
        """That of update `step`."""
        return learning_rate(step - self.schedule_start, self.schedule_steps, self.optimizer.lr, self.schedule)

    @property
    def learning_rates(self) -> np.ndarray:
        """Those of its updates, float64 [steps]; not to be written to."""
        rates = learning_rates(self.schedule_steps, self.optimizer.lr, self.schedule)
        return rates[self.start - self.schedule_start:self.end - self.schedule_start]

    def identity(self, fingerprints: list[str], vocabulary: Vocabulary) -> dict[str, Any]:
        """What of it determines a state, but for how far it goes and the learning rates on the way."""
        data = schema.to_dict(self.data)
        return {
            "objective": self.objective.identity(vocabulary),
            "optimizer_state": self.optimizer_state,
            "data": {"sources": [{"fingerprint": fingerprint, "weight": source.weight} for fingerprint, source
                                 in zip(fingerprints, self.data.train, strict=True)],
                     **{key: data[key] for key in ("seed", "sequence_length", "isolate_documents", "random_length")}},
            "batch_global_size": self.batch_size, "optimizer": self.optimizer.identity(), "precision": self.precision,
            **({"freeze": self.freeze.words} if self.freeze else {})}


def lay_out(config: Config) -> list[Stretch]:
    """The phases with their steps; their lengths must add up to `run.total` where that is given."""
    tokens_step = config.batch.global_size * config.data.sequence_length
    total = config.run.total.steps
    if config.run.total.tokens is not None:
        total = math.ceil(config.run.total.tokens / tokens_step)
    ends, position = [0], 0.0
    for index, settings in enumerate(config.phases):
        position += _length(settings, total, tokens_step)
        ends.append(round(position))
        if ends[-1] <= ends[-2]:
            raise UserError(f"phases.{index}: {settings.name!r} comes to less than one step of {tokens_step} tokens")
    if total is not None and abs(position - total) > 0.5:
        lengths = " + ".join(str(end - start) for start, end in zip(ends, ends[1:], strict=False))
        raise UserError(f"phases: their steps {lengths} = {ends[-1]} do not add up to the run's total of {total} "
                        "steps; change the phases or run.total")
    pieces = [(end - start, tokens_step) for start, end in zip(ends, ends[1:], strict=False)]
    schedule = _in_steps("schedule", config.schedule, pieces)
    stretches, optimizer, freeze = [], config.optimizer, Frozen()
    for index, (settings, start, end) in enumerate(zip(config.phases, ends, ends[1:], strict=False)):
        optimizer = replace(optimizer, lr=settings.lr or optimizer.lr)
        if settings.freeze is not None:
            freeze = Frozen.parse(settings.freeze)
            freeze.check(config.model.num_layers, config.model.tied_embeddings, f"phases.{index}.freeze")
        own = schedule, 0, ends[-1]
        if settings.schedule is not None:
            own = (_in_steps(f"phases.{index}.schedule", settings.schedule, pieces[index:index + 1]), start,
                   end - start)
        stretches.append(Stretch(
            index, settings.name, start, end, start, end - start, start * config.batch.global_size, settings.objective,
            settings.optimizer_state, config.data, config.batch.global_size, optimizer, *own,
            config.precision.identity(), freeze))
    return stretches


def _length(phase: PhaseSettings, total: int | None, tokens_step: int) -> float:
    if phase.steps is not None:
        return phase.steps
    if phase.tokens is not None:
        return math.ceil(phase.tokens / tokens_step)
    if total is None:
        raise UserError(f"phases: {phase.name!r} is a fraction of the run, so run.total.steps or "
                        "run.total.tokens must be given")
    return phase.fraction * total


def _in_steps(where: str, given: ScheduleSettings, pieces: list[tuple[int, int]]) -> ScheduleSettings:
    """`given` in steps alone. pieces: (steps, tokens of a step) of all that it covers, in order."""
    schedule, total = given.in_steps(pieces), sum(steps for steps, _ in pieces)
    if schedule.warmup_steps + schedule.decay_steps > total:
        warmup, decay = (f"{name}_steps={steps}" if tokens is None else f"{name}_tokens={tokens} ({steps} steps)"
                         for name, steps, tokens in (("warmup", schedule.warmup_steps, given.warmup_tokens),
                                                     ("decay", schedule.decay_steps, given.decay_tokens)))
        raise UserError(f"{where}: {warmup} + {decay} is more than its {total} steps")
    return schedule


def with_phase_steps(config: Config, stretches: list[Stretch]) -> Config:
    """The config with every phase's length, and the total, in steps."""
    settings = [replace(old, steps=stretch.steps, tokens=None, fraction=None)
                for old, stretch in zip(config.phases, stretches, strict=True)]
    total = replace(config.run.total, steps=stretches[-1].end, tokens=None)
    return replace(config, phases=settings, run=replace(config.run, total=total))


@dataclass(eq=False)
class Timeline:
    """A run as its stretches in order. beginning: what the state at step 0 follows from, `{"run_seed": 1234}` or
    `{"weights": {step, history_hash}}` of another run. model: the trunk's part of the history. fingerprints: of the
    sources in `data.train`."""

    stretches: list[Stretch]
    beginning: dict[str, Any]
    model: dict[str, Any]
    fingerprints: list[str]
    vocabulary: Vocabulary
    _rates: dict[int, tuple[int, Any]] = field(default_factory=dict)  # start of a stretch -> hash up to which step

    @property
    def total_steps(self) -> int:
        return self.stretches[-1].end

    @property
    def phase_ends(self) -> set[int]:
        return set({stretch.index: stretch.end for stretch in self.stretches}.values())

    def at(self, step: int) -> Stretch:
        """The stretch that update `step` (1 .. total_steps) belongs to; the last one beyond the end."""
        return next((stretch for stretch in self.stretches if step <= stretch.end), self.stretches[-1])

    def of_sample(self, index: int) -> tuple[Stretch, int]:
        """The stretch and the step that read window `index`."""
        stretch = next(one for one in self.stretches if index < one.samples(one.end).stop)
        return stretch, stretch.start + 1 + (index - stretch.first_sample) // stretch.batch_size

    def history(self, step: int) -> dict[str, Any]:
        """What determined the state after `step`; equal histories mean interchangeable states."""
        return {"step": step, **self.beginning, "model": self.model, "stretches": [
            {"start": stretch.start, "end": min(stretch.end, step),
             **stretch.identity(self.fingerprints, self.vocabulary),
             "learning_rates": self._hash_of_rates(stretch, min(stretch.end, step))}
            for stretch in self.stretches if stretch.start < step]}

    def _hash_of_rates(self, stretch: Stretch, end: int) -> str:
        """sha256 of the stretch's learning rates up to step `end`; goes on from where the last call came to."""
        done, digest = self._rates.get(stretch.start, (stretch.start, hashlib.sha256()))
        if done > end:
            done, digest = stretch.start, hashlib.sha256()
        digest.update(stretch.learning_rates[done - stretch.start:end - stretch.start].tobytes())
        self._rates[stretch.start] = end, digest
        return digest.hexdigest()

    def adopting(self, recorded: dict[str, Any]) -> "Timeline":
        """This timeline where the steps of the `recorded` history were done in the precisions recorded; the config's
        holds for those to come. Nothing else can change inside a phase."""
        done = [(part["end"], part["precision"]) for part in recorded.get("stretches", ())]
        stretches: list[Stretch] = []
        for stretch in self.stretches:
            while done and stretch.start < done[0][0] <= stretch.end:
                end, precision = done.pop(0)
                stretches.append(_cut(stretch, stretch.start, end, precision))
                stretch = _cut(stretch, end, stretch.end, stretch.precision)
            if stretch.steps:
                stretches.append(stretch)
        return replace(self, stretches=_joined(stretches), _rates={})


def _cut(stretch: Stretch, start: int, end: int, precision: dict[str, Any]) -> Stretch:
    return replace(stretch, start=start, end=end, precision=precision,
                   first_sample=stretch.first_sample + (start - stretch.start) * stretch.batch_size,
                   optimizer_state=stretch.optimizer_state if start == stretch.start else "carry")


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    """Neighbours of one phase that differ in nothing, as one."""
    joined: list[Stretch] = []
    for stretch in stretches:
        last = joined[-1] if joined else None
        if last and last.index == stretch.index and last.precision == stretch.precision:
            joined[-1] = replace(last, end=stretch.end)
        else:
            joined.append(stretch)
    return joined
