"""Which models are points of one curve: checkpoints of a run, or one recipe at growing budgets.

A model's `model.json` says so (`step`, `series`, and what its `run` did); otherwise its name does, in the paper's way:

    610m-mlm40-42k                42k steps of MLM at 40 %
    610m-clm-10k-mlm40-42k        10k steps of CLM, then MLM up to 42k in all: a CLM share of 24 %
    610m-clm-dec42k-mlm40-64k     MLM on a decayed CLM checkpoint
    anything@1500, anything-step1500, anything-1500

    1. `parse(name)`                 a name -> `ModelName`, or None
    2. `curves(models, records)`     scores over steps, where there are two points or more
    3. `shares(models, records)`     scores over the CLM share of one budget, the paper's split figure
    4. `ratios(models, records)`     scores over the mask ratio
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_encdec.study.results import ModelRecord, natural

_COUNT = r"[0-9]+(?:\.[0-9]+)?[kKmM]?"
_STAGE = re.compile(rf"(?P<objective>(?:clm|mlm|mntp|mdlm)[0-9]*)-(?P<decayed>dec)?(?P<steps>{_COUNT})")
_ANY_STAGE = re.sub(r"\?P<\w+>", "?:", _STAGE.pattern)  # without names, which a pattern may hold only once
_PAPER = re.compile(rf"(?:(?P<prefix>.+?)-)??(?P<stages>{_ANY_STAGE}(?:-{_ANY_STAGE})*)")
_STEP = re.compile(rf"(?P<series>.+?)(?:@|[-_]step[-_]?|-)(?P<steps>{_COUNT})")
Curves = dict[str, list[tuple[float, str]]]  # by the curve's name: where each of its models stands
_SHARE_GRID = 20  # shares are told apart in twentieths: 3 of 12, 5 of 22 and 10 of 42 thousand steps are all "25 %"


@dataclass(frozen=True)
class Stage:
    """An objective and the step it ends at, counted from the beginning; `decayed` if the learning rate ended there."""

    objective: str
    end: int
    decayed: bool


@dataclass(frozen=True)
class ModelName:
    """What a name in the paper's style says: a `prefix` (the size, mostly), and the stages in their order."""

    prefix: str
    stages: tuple[Stage, ...]

    @property
    def objectives(self) -> list[str]:
        return [stage.objective for stage in self.stages]

    @property
    def steps(self) -> int:
        return self.stages[-1].end

    @property
    def share(self) -> float | None:
        """Part of all steps before the last stage, for a switch under one schedule; None for other names."""
        if len(self.stages) == 1:
            return 1.0 if self.objectives == ["clm"] else 0.0
        return self.stages[0].end / self.steps if len(self.stages) == 2 and not self.stages[0].decayed else None


def parse(name: str) -> ModelName | None:
    """What a name in the paper's style says; None for other names."""
    match = _PAPER.fullmatch(name)
    if not match:
        return None
    stages = tuple(Stage(stage["objective"], _steps(stage["steps"]), bool(stage["decayed"]))
                   for stage in _STAGE.finditer(match["stages"]))
    ascending = all(a.end < b.end for a, b in zip(stages, stages[1:], strict=False))
    return ModelName(match["prefix"] or "", stages) if ascending else None


def _steps(text: str) -> int:
    """`42k` -> 42000."""
    factor = {"k": 1000, "m": 1_000_000}.get(text[-1].lower(), 1)
    return round(float(text.rstrip("kKmM")) * factor)


def curves(models: Iterable[str], records: Mapping[str, ModelRecord]) -> Curves:
    """Series of two checkpoints or more, in order of steps."""
    points: dict[str, dict[int, str]] = defaultdict(dict)
    for model in models:
        for series, step in _series(model, records.get(model)):
            points[series].setdefault(step, model)
    found: Curves = {}
    for series in sorted(points, key=natural):
        curve = sorted(points[series].items())
        if len(curve) > 1 and curve not in found.values():
            found[series] = curve
    return found


def described(model: str, record: ModelRecord | None) -> ModelName | None:
    """A model by what its run did, where that is on record, else by its name."""
    phases = record.run.get("phases") if record else None
    if not phases:
        return parse(model)
    seed = f"-s{record.run.get('seed')}"
    prefix = (record.run.get("size") or "") + (seed if model.endswith(seed) else "")
    return ModelName(prefix, tuple(Stage(one["name"], one["end"], one["decayed"]) for one in phases))


def _series(model: str, record: ModelRecord | None) -> list[tuple[str, int]]:
    """Every series that a model may be a point of: the runs it lies on and, for a biphasic one, the recipe."""
    by_step, name = _STEP.fullmatch(model), described(model, record)
    given = [(one, record.step) for one in record.series] if record else []
    if name is None:
        if record is None:
            return [(by_step["series"], _steps(by_step["steps"]))] if by_step else []
        return given or [(by_step["series"] if by_step else model, record.step)]
    *before, last = name.stages
    done = [f"{one.objective} {'decayed ' if one.decayed else ''}{short_steps(one.end)}" for one in before]
    prefix = [name.prefix] if name.prefix else []
    end = ["→", last.objective] if before else [last.objective]
    run = given or [(" ".join(prefix + done + end), name.steps)]
    if name.share in (None, 0.0, 1.0) or not _is_end(record):
        return run
    percent = round(name.share * _SHARE_GRID) * 100 // _SHARE_GRID
    return [*run, (" ".join([*prefix, before[0].objective, f"{percent} %", *end]), name.steps)]


def shares(models: Iterable[str], records: Mapping[str, ModelRecord] = MappingProxyType({})) -> Curves:
    """Models of one size, objective pair and budget by their CLM share in per cent, from MLM alone (0) to CLM alone
    (100), as in the paper's split figure; at least three points with a switch among them."""
    names = {model: name for model, name in _finished(models, records) if name.share is not None}
    switched = {(one.prefix, one.objectives[1], one.steps) for one in names.values()
                if len(one.stages) == 2 and one.objectives[0] == "clm"}
    found: Curves = {}
    for prefix, last, total in sorted(switched, key=lambda one: (natural(one[0]), *one[1:])):
        points = sorted((100 * one.share, model) for model, one in names.items()
                        if (one.prefix, one.steps) == (prefix, total)
                        and one.objectives in (["clm"], [last], ["clm", last]))
        if len(points) > 2:
            found[f"{prefix} clm → {last}, {short_steps(total)} steps".strip()] = points
    return found


def ratios(models: Iterable[str], records: Mapping[str, ModelRecord] = MappingProxyType({})) -> Curves:
    """Models of one size and budget that mask from the first step on, by their mask ratio in per cent; at least two."""
    points: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for model, name in _finished(models, records):
        masked = re.fullmatch(r"([a-z]+)([\d.]+)", name.stages[0].objective)  # at one ratio, token by token
        if len(name.stages) == 1 and masked:
            curve = f"{name.prefix} {masked[1]}, {short_steps(name.steps)} steps".strip()
            points[curve].append((float(masked[2]), model))
    return {label: sorted(found) for label, found in sorted(points.items(), key=lambda one: natural(one[0]))
            if len(found) > 1}


def _finished(models: Iterable[str], records: Mapping[str, ModelRecord]) -> Iterator[tuple[str, ModelName]]:
    """Models that are the end of their run, as far as is known."""
    for model in models:
        record = records.get(model)
        if _is_end(record) and (name := described(model, record)):
            yield model, name


def _is_end(record: ModelRecord | None) -> bool:
    """Whether it is no checkpoint on the way: the last step planned, or one whose learning rate had decayed."""
    run = record.run if record else {}
    return not run or record.step == run["total"] or bool(run["phases"]) and run["phases"][-1]["decayed"]


def short_steps(count: int) -> str:
    """42000 -> `42k`."""
    return f"{count / 1000:g}k" if count >= 1000 and count % 100 == 0 else str(count)
