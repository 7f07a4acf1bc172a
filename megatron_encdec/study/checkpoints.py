"""Which models are points of one curve: checkpoints of a run, or one recipe at growing budgets.

A model's `model.json` says so (`step`, `series`); otherwise its name does, in the paper's way of naming:

    610m-mlm40-42k                42k steps of MLM at 40 %
    610m-clm-10k-mlm40-42k        10k steps of CLM, then MLM up to 42k in all: a CLM share of 24 %
    610m-clm-dec42k-mlm40-64k     MLM on a decayed CLM checkpoint
    anything@1500, anything-step1500, anything-1500

    1. `parse(name)`                 a name -> `Lineage`, or None
    2. `curves(models, records)`     {series: [(step, model), ...]}, only where there are two points or more
    3. `shares(models)`              {(series, steps in all): [(CLM share, model), ...]}, the paper's split figure
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_encdec.study.results import ModelRecord, natural

_STEPS = r"(?:dec)?\d+(?:\.\d+)?[kKmM]?"
_STAGE = re.compile(rf"(?P<objective>[a-zA-Z]+\d*)-(?P<steps>{_STEPS})")
_KNOWN_STAGE = rf"(?:clm|mlm|mntp)\d*-{_STEPS}"
_PAPER = re.compile(rf"(?:(?P<prefix>.+?)-)??(?P<stages>{_KNOWN_STAGE}(?:-{_KNOWN_STAGE})*)")
_STEP = re.compile(r"(?P<series>.+?)(?:@|[-_]step[-_]?|-)(?P<steps>\d+(?:\.\d+)?[kKmM]?)")
_SHARE_GRID = 20  # shares are told apart in twentieths: 3 of 12, 5 of 22 and 10 of 42 thousand steps are all "25 %"


@dataclass(frozen=True)
class Stage:
    """An objective and the step it ends at, counted from the beginning; `decayed` if the learning rate ended there."""

    objective: str
    end: int
    decayed: bool


@dataclass(frozen=True)
class Lineage:
    """`prefix` (the size, mostly), and the stages in their order."""

    prefix: str
    stages: tuple[Stage, ...]

    @property
    def step(self) -> int:
        """Steps in all."""
        return self.stages[-1].end

    @property
    def share(self) -> float | None:
        """Part of all steps before the last stage, for a switch under one schedule; None for other lineages."""
        if len(self.stages) == 1:
            return {"clm": 1.0}.get(self.stages[0].objective, 0.0)
        return self.stages[0].end / self.step if len(self.stages) == 2 and not self.stages[0].decayed else None


def parse(name: str) -> Lineage | None:
    """What a name in the paper's style says; None for other names."""
    match = _PAPER.fullmatch(name)
    if not match:
        return None
    found = [(stage["objective"], stage["steps"]) for stage in _STAGE.finditer(match["stages"])]
    stages = tuple(Stage(objective, steps(end.removeprefix("dec")), end.startswith("dec")) for objective, end in found)
    ascending = all(a.end < b.end for a, b in zip(stages, stages[1:], strict=False))
    return Lineage(match["prefix"] or "", stages) if ascending else None


def steps(text: str) -> int:
    """`42k` -> 42000."""
    factor = {"k": 1000, "m": 1_000_000}.get(text[-1].lower(), 1)
    return round(float(text.rstrip("kKmM")) * factor)


def curves(models: Iterable[str], records: Mapping[str, ModelRecord]) -> dict[str, list[tuple[int, str]]]:
    """Series of checkpoints, each by its name and in order of steps."""
    models = list(models)
    points: dict[str, dict[int, str]] = defaultdict(dict)
    for model in models:
        for series, step in _series(model, records.get(model)):
            points[series].setdefault(step, model)
    found: dict[str, list[tuple[int, str]]] = {}
    for series in sorted(points, key=natural):
        curve = sorted(points[series].items())
        if len(curve) > 1 and curve not in found.values():
            found[series] = curve
    return found


def _series(model: str, record: ModelRecord | None) -> list[tuple[str, int]]:
    """Every series that a model may be a point of: the run it lies on and, for a biphasic one, the recipe."""
    if record is not None:
        return [(record.series or _without_step(model), record.step)]
    lineage = parse(model)
    if lineage is None:
        match = _STEP.fullmatch(model)
        return [(match["series"], steps(match["steps"]))] if match else []
    prefix = f"{lineage.prefix} " if lineage.prefix else ""
    last = lineage.stages[-1].objective
    before = " ".join(f"{stage.objective} {'decayed ' if stage.decayed else ''}{short_steps(stage.end)}"
                      for stage in lineage.stages[:-1])
    run = (f"{prefix}{before} → {last}" if before else f"{prefix}{last}", lineage.step)
    if lineage.share in (None, 0.0, 1.0):
        return [run]
    percent = round(lineage.share * _SHARE_GRID) * 100 // _SHARE_GRID
    return [run, (f"{prefix}{lineage.stages[0].objective} {percent} % → {last}", lineage.step)]


def _without_step(model: str) -> str:
    match = _STEP.fullmatch(model)
    return match["series"] if match else model


def shares(models: Iterable[str]) -> dict[tuple[str, int], list[tuple[float, str]]]:
    """Models of one size, objective pair and budget by their CLM share; at least three points with a switch among them.

    The ends are CLM alone (share 1) and MLM alone (share 0).
    """
    lineages = {model: lineage for model in models if (lineage := parse(model)) and lineage.share is not None}
    switched = {(one.prefix, one.stages[-1].objective, one.step) for one in lineages.values()
                if len(one.stages) == 2 and one.stages[0].objective == "clm"}
    found = {}
    for prefix, last, total in sorted(switched, key=lambda one: (natural(one[0]), one[1], one[2])):
        points = sorted((one.share, model) for model, one in lineages.items()
                        if one.prefix == prefix and one.step == total and _belongs(one, last))
        if len(points) > 2:
            found[f"{prefix} clm → {last}".strip(), total] = points
    return found


def _belongs(lineage: Lineage, last: str) -> bool:
    names = [stage.objective for stage in lineage.stages]
    return names in (["clm"], [last], ["clm", last])


def short_steps(count: int) -> str:
    """42000 -> `42k`."""
    if count >= 1000 and count % 100 == 0:
        return f"{count / 1000:g}k"
    return str(count)
