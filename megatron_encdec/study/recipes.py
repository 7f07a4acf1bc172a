"""Names that are recipes, in the grammar of arXiv 2507.00994, and what they come to as a pretraining config.

    610m-mlm40-42k                        42k steps of MLM at 40 %
    610m-clm-10k-mlm40-42k                10k steps of CLM, then MLM up to 42k in all, under one schedule
    610m-clm-dec42k-mlm40-64k             all of 610m-clm-42k, its decay included, then 22k steps of MLM
    {210m,610m}-mlm{20,40}-42k            braces make several, as in a shell

    1. `expand(pattern)`                  a pattern -> names
    2. `planned_models(study)`            the study's models, each as the config of a run (`Recipe`)
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_encdec.model.config import PRESETS
from megatron_encdec.objectives.base import OBJECTIVES
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.study.config import ContinuedPretraining, ModelEntry, Resources, StudyConfig
from megatron_encdec.study.curves import ModelName, parse
from megatron_encdec.training.config import Config, From
from megatron_encdec.training.layout import lay_out, with_phase_steps
from megatron_encdec.training.plan import check_topology, definite, with_dtype
from megatron_encdec.training.stretches import Stretch

BASE = "base"  # key of resources for models without a size
_GRAMMAR = "SIZE-OBJECTIVE-STEPS, such as 610m-mlm40-42k, 610m-clm-10k-mlm40-42k or 610m-clm-dec42k-mlm40-64k"


@dataclass(frozen=True)
class Recipe:
    """A model of a study: `config` of its run, without a directory. before: the recipe whose last weights it begins
    from with steps and data of its own (`cpt.samples: restart`)."""

    name: str
    size: str
    seed: int
    config: Config
    before: "Recipe | None" = None

    @property
    def stretches(self) -> list[Stretch]:
        """Its phases, by themselves."""
        return lay_out(self.config)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.config.run.total.steps + (self.before.steps if self.before else 0)


def expand(pattern: str) -> list[str]:
    """`{a,b}-c{1,2}` -> `a-c1`, `a-c2`, `b-c1`, `b-c2`; braces may stand inside braces."""
    head, opened, _ = pattern.partition("{")
    if "}" in head:
        raise UserError(f"models: {pattern!r}: a brace that is never opened")
    if not opened:
        return [pattern]
    depth, begin, choices = 0, len(head) + 1, []
    for place in range(len(head), len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0 or (depth == 1 and pattern[place] == ","):
            choices.append(pattern[begin:place].strip())
            begin = place + 1
        if depth == 0:
            rest = expand(pattern[begin:])
            return [head + one + end for choice in choices for one in expand(choice) for end in rest]
    raise UserError(f"models: {pattern!r}: a brace that is never closed")


def planned_models(study: StudyConfig) -> list[Recipe]:
    """Every model of the study in its order, once for each seed. Raises `UserError` that names the entry."""
    base = schema.load_yaml(study.base)
    for key in ("run", "data", "optimizer", "batch", "parallel"):
        if not isinstance(base.get(key) or {}, dict):
            raise UserError(f"{study.base}: {key}: expected a mapping of keys, found {base[key]!r}")
    if not isinstance(base.get("model") or {}, (dict, str)):
        raise UserError(f"{study.base}: model: expected a preset's name or a mapping, found {base['model']!r}")
    origin = (base.get("run") or {}).get("from")
    if origin and not (isinstance(origin, dict) and origin.get("state") == "weights"):
        raise UserError(f"{study.base}: run.from: a study's models begin with run.seed, or with another run's weights "
                        "alone; give it state: weights, or leave it out")
    if unknown := [key for key in study.resources if key not in (BASE, *PRESETS)]:
        raise UserError(f"resources.{unknown[0]}: no such size; sizes are {', '.join(PRESETS)}, and {BASE} for models "
                        "without one")
    entries = [one for entry in study.models for one in (expand(entry) if isinstance(entry, str) else [entry])]
    recipes, seen = [], set()
    for entry in entries:
        for name, variant, seed in _variants(study, base, entry if isinstance(entry, str) else entry.name):
            if name in seen:
                raise UserError(f"models: {name} is given twice")
            seen.add(name)
            try:
                recipes.append(_recipe(study, variant, entry, name, seed))
            except UserError as error:
                raise UserError(f"models: {name}: {error}") from None
    return recipes


def _variants(study: StudyConfig, base: dict, name: str) -> Iterator[tuple[str, dict, int]]:
    """The base for each seed, with the model's name."""
    if not study.seeds:
        yield name, base, (base.get("run") or {}).get("seed", 1234)
    for seed in study.seeds:
        variant = copy.deepcopy(base)
        for section in ("run", "data"):
            variant[section] = {**(variant.get(section) or {}), "seed": seed}
        yield f"{name}-s{seed}", variant, seed


def _recipe(study: StudyConfig, base: dict, entry: str | ModelEntry, name: str, seed: int) -> Recipe:
    if isinstance(entry, ModelEntry):
        given = {"phases": [{"name": f"phase{number}", **phase} for number, phase in enumerate(entry.phases)]}
        config = _config(study, base, entry.size, {**given, **({"schedule": entry.schedule} if entry.schedule else {})})
        return Recipe(name, entry.size or "", seed, config)
    parsed = parse(entry)
    if parsed is None:
        raise UserError(f"cannot be read as a recipe; expected {_GRAMMAR} with steps that grow, "
                        "or a mapping with name and phases")
    if any(stage.decayed for stage in parsed.stages[1:]) or parsed.stages[0].decayed and len(parsed.stages) != 2:
        raise UserError("only the first of two stages can be a decayed one (dec)")
    size = parsed.prefix or None
    if not parsed.stages[0].decayed:
        return Recipe(name, parsed.prefix, seed, _config(study, base, size, {"phases": _phases(parsed)}))
    return _continued(study, base, parsed, name, seed)


def _continued(study: StudyConfig, base: dict, parsed: ModelName, name: str, seed: int) -> Recipe:
    """A model that goes on after a first phase with a schedule of its own, decay included."""
    first, last = _phases(parsed)
    whole = _config(study, base, parsed.prefix or None, {"phases": [first]})  # the first part as a model of its own
    first["schedule"] = schema.to_dict(whole.schedule)
    last |= _continuation(study.cpt, whole)
    if study.cpt.samples == "continue":
        return Recipe(name, parsed.prefix, seed, _config(study, base, parsed.prefix or None, {"phases": [first, last]}))
    optimizer = {**(base.get("optimizer") or {}), "lr": last.pop("lr") or whole.optimizer.lr}
    config = _config(study, base, parsed.prefix or None,
                     {"schedule": last.pop("schedule"), "optimizer": optimizer, "phases": [last]})
    config = replace(config, run=replace(config.run, from_=From("", parsed.stages[0].end, "weights")))
    return Recipe(name, parsed.prefix, seed, config, Recipe(f"{name} (first part)", parsed.prefix, seed, whole))


def _continuation(cpt: ContinuedPretraining, base: Config) -> dict[str, Any]:
    """Keys of the phase that goes on from a decayed checkpoint."""
    schedule = schema.to_dict(base.schedule)
    for name, own, part in (("warmup", cpt.warmup_steps, 10), ("decay", cpt.decay_steps, 2)):
        steps, tokens = f"{name}_steps", f"{name}_tokens"
        if own is None and schedule[tokens] is not None:
            schedule[tokens] //= part
        else:
            schedule |= {steps: schedule[steps] // part if own is None else own, tokens: None}
    return {"lr": cpt.lr, "optimizer_state": cpt.optimizer_state, "schedule": schedule}


def _phases(parsed: ModelName) -> list[dict[str, Any]]:
    """The phases that a name spells out."""
    phases, start = [], 0
    for number, stage in enumerate(parsed.stages):
        kind, digits = re.fullmatch(r"([a-z]+)(\d*)", stage.objective).groups()
        if kind not in OBJECTIVES:
            raise UserError(f"{kind!r} is no objective here; known: {', '.join(OBJECTIVES)}")
        if digits and not OBJECTIVES[kind].short:
            raise UserError(f"{stage.objective}: {kind} takes no number")
        setting = {OBJECTIVES[kind].short: int(digits) / 100} if digits else {}
        phases.append({"name": kind if kind not in {one["name"] for one in phases} else f"{kind}{number}",
                       "objective": {"name": kind, **setting}, "steps": stage.end - start})
        start = stage.end
    return phases


def _config(study: StudyConfig, base: dict, size: str | None, changes: dict[str, Any]) -> Config:
    """The base with `changes`, the trunk of `size` and its resources; phases in steps."""
    data = {**base, **changes}
    if size is not None:
        if size not in PRESETS:
            raise UserError(f"there is no size {size!r}; sizes are {', '.join(PRESETS)}")
        model = data.get("model") or {}
        own = {} if isinstance(model, str) else {key: value for key, value in model.items() if key not in PRESETS[size]}
        data["model"] = {**own, "preset": size}
    data["run"] = {**(data.get("run") or {}), "total": {}, "dir": "-"}
    resources = study.resources.get(size or BASE)
    if resources:
        data["parallel"] = {**(data.get("parallel") or {}), **resources.parallel}
        if resources.micro_size:
            data["batch"] = {**(data.get("batch") or {}), "micro_size": resources.micro_size}
    config = with_dtype(schema.build(Config, data))
    with contextlib.suppress(UserError):  # an import that is still to be made
        config = replace(config, run=replace(config.run, from_=definite(config.run)))
    stretches = lay_out(config)
    used = resources or Resources()
    check_topology(config, used.ranks * used.nodes)
    return with_phase_steps(config, stretches)
