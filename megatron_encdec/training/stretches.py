"""Stretches: what determines steps a..b of a run as one value, and the history that a state stands on.

    1. `Stretch`                    made from a config by `lay_out` (layout.py)
    2. `Timeline.history(step)`     what determined the state after `step`: the stretches up to it, the last cut there

Steps are optimizer updates counted from 1; a stretch covers the steps start + 1 .. end.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from megatron_encdec.data.config import DataConfig
from megatron_encdec.engine.config import OptimizerSettings, ScheduleSettings, learning_rate, learning_rates
from megatron_encdec.model.parts import Frozen
from megatron_encdec.model.rope import Rope
from megatron_encdec.objectives.base import Objective, Vocabulary
from megatron_encdec.platform import schema


@dataclass(frozen=True)
class Stretch:
    """Steps start + 1 .. end of a run, and all that determines them; `index` and `name` are those of the phase, which
    began after step `phase_start` and has `phase_steps` steps.
    first_sample: windows consumed before it. precision: its part of the history. rope: None where it is the model's.
    The learning rate follows `schedule`, which began after step `schedule_start` and has `schedule_steps` steps.
    micro_size, data_section (of the config, that says the data) and train_key (which gives its sources) change no
    number."""

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
    micro_size: int  # of a micro-batch
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    schedule_start: int
    schedule_steps: int
    precision: dict[str, Any]
    freeze: Frozen = Frozen()
    rope: Rope | None = None
    data_section: str = "data"
    train_key: str = "data.train"

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

    def has_decayed(self, step: int) -> bool:
        """Whether, after the warm-up, it is below half of the peak at update `step`."""
        return (step - self.schedule_start > self.schedule.warmup_steps
                and self.learning_rate(step) < 0.5 * self.optimizer.lr)

    @property
    def learning_rates(self) -> np.ndarray:
        """Those of its updates, float64 [steps]; not to be written to."""
        rates = learning_rates(self.schedule_steps, self.optimizer.lr, self.schedule)
        return rates[self.start - self.schedule_start:self.end - self.schedule_start]

    def identity(self, fingerprints: Mapping[str, str], vocabulary: Vocabulary) -> dict[str, Any]:
        """What of it determines a state, but for how far it goes and the learning rates on the way. fingerprints: of
        sources, by path."""
        data = schema.to_dict(self.data)
        return {
            "objective": self.objective.identity(vocabulary, self.start - self.phase_start, self.phase_steps),
            "optimizer_state": self.optimizer_state,
            "data": {"sources": [{"fingerprint": fingerprints[source.path], "weight": source.weight}
                                 for source in self.data.train],
                     **{key: data[key] for key in ("seed", "sequence_length", "isolate_documents", "random_length")}},
            "batch_global_size": self.batch_size, "optimizer": self.optimizer.identity(), "precision": self.precision,
            **(self.rope.identity() if self.rope else {}), **({"freeze": self.freeze.words} if self.freeze else {})}


def by_phase(stretches: Sequence[Stretch]) -> list[list[Stretch]]:
    """The stretches of each phase, in order."""
    return [list(group) for _, group in groupby(stretches, key=lambda stretch: stretch.index)]


def tokens_between(stretches: Sequence[Stretch], start: int, end: int) -> int:
    """Input tokens of the steps start + 1 .. end."""
    return sum(max(0, min(one.end, end) - max(one.start, start)) * one.tokens_per_step for one in stretches)


@dataclass(eq=False)
class Timeline:
    """A run as its stretches in order. beginning: what the state at step 0 follows from, `{"run_seed": 1234}` or
    `{"weights": {step, history_hash}}` of another run. model: the trunk's part of the history. fingerprints: of all
    training sources, by path."""

    stretches: list[Stretch]
    beginning: dict[str, Any]
    model: dict[str, Any]
    fingerprints: Mapping[str, str]
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
            {"start": stretch.start, "end": min(stretch.end, step), **identity,
             "learning_rates": self._hash_of_rates(stretch, min(stretch.end, step))}
            for stretch, identity in zip(self.stretches, self.identities, strict=True) if stretch.start < step]}

    @cached_property
    def identities(self) -> list[dict[str, Any]]:
        """Of each stretch; made once, since a study asks for many histories."""
        return [stretch.identity(self.fingerprints, self.vocabulary) for stretch in self.stretches]

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
        if last and (last.index, last.precision, last.batch_size) == (
                stretch.index, stretch.precision, stretch.batch_size):
            joined[-1] = replace(last, end=stretch.end)
        else:
            joined.append(stretch)
    return joined
