"""What a run left behind, as series to draw: a run and the runs that it continues, from metrics.jsonl and config.yaml.

    1. `RunHistory.of(directory)`   config, stretches, lines, where it stands
    2. `losses`, `series`           (steps, values) of its train lines, phase by phase; `validation`, `distances`
    3. `events`                     what happened besides steps: resumes, changes, ends of phases, skips, failures
    4. `epochs`                     how often each source was read, from the declarations of its data
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np

from megatron_encdec.data.training_data import Declaration, TrainingData
from megatron_encdec.inspection.run import describe, of_kind, read_run, with_ancestors
from megatron_encdec.rundir.lock import holder
from megatron_encdec.training.config import Config
from megatron_encdec.training.layout import declarations, lay_out
from megatron_encdec.training.sources import open_train
from megatron_encdec.training.stretches import Stretch, by_phase

PLACES = 200  # at which the epochs of a source are told, between the first step and the last


class Series(NamedTuple):
    """Values at steps, both [points]; steps ascend."""

    steps_P: np.ndarray
    values_P: np.ndarray


class Event(NamedTuple):
    """Something that happened after `step`. kind: begin, resume, change, phase, skip, failed save or failure."""

    step: int
    kind: str
    what: str


class SourceRead(NamedTuple):
    """A source in a phase: its share of the samples, and epochs read from the run's beginning to the phase's."""

    phase: str
    path: str
    share: float
    tokens: int
    sequence_length: int
    epochs_now: float
    epochs_planned: float


@dataclass(frozen=True)
class RunHistory:
    """One run. `report` is what `inspect run` knows of it, `records` its lines with those of the runs that it
    continues."""

    directory: str
    config: Config
    records: list[dict]
    report: dict
    stretches: list[Stretch]

    @classmethod
    def of(cls, directory: str, with_entropy: bool) -> "RunHistory":
        """That of the run in `directory`. Raises `UserError` where it is no run, or has no step yet."""
        config, records = read_run(directory)
        report = describe(directory, config, records, with_entropy)
        return cls(directory, config, with_ancestors(records), report, lay_out(config))

    @property
    def step(self) -> int:
        return self.report["step"]

    @property
    def planned(self) -> int:
        return self.report["planned_steps"]

    @property
    def phase_ends(self) -> list[tuple[str, int, int]]:
        """(name, first step - 1, last step) of each phase, reached or not."""
        return [(parts[0].name, parts[0].start, parts[-1].end) for parts in by_phase(self.stretches)]

    @property
    def state(self) -> str:
        """Where it stands, in words."""
        where = f"step {self.step:,} of {self.planned:,}"
        if self.report["failure"]:
            return f"failed after {where}"
        if self.step >= self.planned:
            return f"finished, {where}"
        launch = holder(self.directory)
        if launch is None:
            return f"stopped after {where}"
        if launch.runs_here:
            return f"running, {where}"
        return f"killed after {where}" if launch.is_here else f"{where}, last held by {launch.host}"

    def tokens(self, steps_P: Sequence[int] | np.ndarray) -> np.ndarray:
        """Input tokens read up to and with each step, in millions."""
        ends = [0, *(one.end for one in self.stretches)]
        counts = np.cumsum([0, *(one.steps * one.tokens_per_step for one in self.stretches)])
        return np.interp(np.asarray(steps_P, float), ends, counts / 1e6)

    @cached_property
    def _trained(self) -> list[dict]:
        return of_kind("train", self.records)

    def series(self, key: str) -> list[Series]:
        """A field of the train lines, phase by phase, without lines that have none."""
        found = [_series((line["step"], line.get(key)) for line in lines)
                 for _, lines in groupby(self._trained, key=lambda line: line["phase"])]
        return [one for one in found if len(one.steps_P)]

    @property
    def losses(self) -> dict[str, list[Series]]:
        """Training losses by objective, a series for each phase that trains it: across a switch there is no mean."""
        found: dict[str, dict[str, list]] = {}
        for line in self._trained:
            mine = found.setdefault(line["objective"], {}).setdefault(line["phase"], [])
            mine.append((line["step"], line["loss"]))
        return {objective: [one for points in phases.values() if len((one := _series(points)).steps_P)]
                for objective, phases in found.items()}

    @property
    def validation(self) -> dict[str, Series]:
        """Validation losses by objective."""
        return self._of_evaluations("losses")

    @property
    def distances(self) -> dict[str, Series]:
        """Of each part of the trunk from its phase's first weights, where that was logged."""
        return self._of_evaluations("distance")

    def _of_evaluations(self, key: str) -> dict[str, Series]:
        lines = of_kind("eval", self.records)
        names = dict.fromkeys(name for line in lines for name in line.get(key, ()))
        found = {name: _series((line["step"], line.get(key, {}).get(name)) for line in lines) for name in names}
        return {name: one for name, one in found.items() if len(one.steps_P)}

    @property
    def not_finite(self) -> Counter[tuple[str, str]]:
        """How many values cannot be drawn, being NaN or infinite: by the field of the lines and, of eval lines, the
        name in it. Runs of earlier versions have them as such; now a loss is null, and `nonfinite` says what it was."""
        evaluations = of_kind("eval", self.records)
        values = [(name, "", value) for line in self._trained for name, value in line.items()]
        values += [(key, name, value) for line in evaluations for key in ("losses", "distance")
                   for name, value in line.get(key, {}).items()]
        values += [("losses", name, math.nan) for line in evaluations for name in line.get("nonfinite", ())]
        return Counter((key, name) for key, name, value in values
                       if isinstance(value, float) and not math.isfinite(value))

    @property
    def checkpoints(self) -> list[dict]:
        """The checkpoint lines of saves that came to their end."""
        return [line for line in of_kind("checkpoint", self.records) if "error" not in line]

    @property
    def events(self) -> list[Event]:
        """In the order of the lines; a failure, which has none, at the end."""
        failure = self.report["failure"]
        ended = [Event(failure["step"], "failure", failure["reason"])] if failure else []
        return [event for record in self.records for event in _events(record)] + ended

    def epochs(self) -> tuple[list[SourceRead], dict[str, Series]]:
        """Of each phase its sources; and epochs over steps by source. Raises `UserError` where data is not there."""
        declared = declarations(self.stretches)
        data = TrainingData(declared, open_train(self.config))
        read = [one for parts in by_phase(self.stretches) for one in self._read_in(parts, declared, data)]
        steps = sorted({*np.linspace(0, self.step, PLACES).astype(int), *(one.end for one in self.stretches
                                                                          if one.end < self.step)})
        several = len({part.sequence_length for part in data.parts}) > 1
        points: dict[str, list] = {}
        for step in steps:
            number, part = _part_at(declared, data, self._samples(step))
            windows = f" in windows of {part.sequence_length:,}" if several else ""
            for source, epochs in zip(declared[number].config.train, part.epochs(self._samples(step)), strict=True):
                points.setdefault(f"{source.path}{windows}", []).append((step, epochs))
        return read, {path: _series(found) for path, found in points.items()}

    def _read_in(self, parts: list[Stretch], declared: list[Declaration], data: TrainingData) -> list[SourceRead]:
        number, part = _part_at(declared, data, parts[0].first_sample + 1)
        sources, planned = declared[number].config.train, self._samples(parts[-1].end)
        now = min(planned, max(parts[0].first_sample, self._samples(self.step)))
        total = sum(source.weight for source in sources)
        return [SourceRead(parts[0].name, source.path, source.weight / total, store.tokens, part.sequence_length,
                           *epochs) for source, store, *epochs in
                zip(sources, part.stores, part.epochs(now), part.epochs(planned), strict=True)]

    def _samples(self, step: int) -> int:
        """Windows read after `step`."""
        stretch = next((one for one in self.stretches if step <= one.end), self.stretches[-1])
        return stretch.first_sample + max(0, step - stretch.start) * stretch.batch_size


def _part_at(declared: list[Declaration], data: TrainingData, samples: int):
    """The number and the `Samples` of the declaration that the last of so many samples falls to."""
    number = max((place for place, one in enumerate(declared) if one.first < samples), default=0)
    return number, data.parts[number]


def _series(points) -> Series:
    """Of (step, value) without None, NaN and what is infinite; where a step was logged twice its last line counts."""
    found = sorted({step: value for step, value in points if value is not None and math.isfinite(value)}.items())
    return Series(np.array([step for step, _ in found]), np.array([value for _, value in found], float))


def _events(record: dict) -> list[Event]:
    step, kind = record.get("step", 0), record.get("kind")
    if kind == "phase":
        return [Event(step, "phase", f"end of phase {record['phase']}")]
    if kind == "checkpoint" and "error" in record:
        return [Event(step, "failed save", record["error"])]
    if kind == "train" and "nonfinite" in record:
        found = record["nonfinite"]
        return [Event(step, "skip", f"loss {found['loss']}, gradient norm {found['grad_norm']}: not learnt from")]
    if kind != "resume":
        return []
    parent, topology = record.get("parent"), record.get("topology") or {}
    ranks = topology.get("world_size")
    on = f" on {ranks} rank{'s' * (ranks != 1)}" if ranks else ""
    if parent:
        alone = ", its weights alone" if parent["state"] == "weights" else ""
        found = [Event(step, "begin", f"from {parent['path']}@{parent['step']}{alone}{on}")]
    else:
        found = [Event(step, "resume", f"continued after step {step:,}{on}")]
    if fallback := record.get("fallback"):
        found.append(Event(step, "change", f"{fallback['damaged']} was damaged and passed over"))
    return found + [Event(step, "change", f"{key}: {then} -> {now}")
                    for key, (then, now) in record.get("changed", {}).items()]
