"""STUDY.yaml: which models to compare, from which base, with which seeds, and where.

    base: 610m.yaml                    a pretraining config: data, tokenizer, batch, optimizer, schedule of every model
    output: work_dirs/study            stretches, exports, results and report go there
    models:                            names that are recipes (recipes.py), or a name with its phases
      - "{210m,610m}-mlm{20,30,40,50}-42k"
      - 610m-clm-10k-mlm40-42k
      - {name: curriculum, size: 610m, phases: [{objective: clm, steps: 1000}, {objective: "mlm:0.3", steps: 2000}]}

`base` and `output` are relative to the study file; paths inside the base to the working directory.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_encdec.finetune.config import FinetuneConfig
from megatron_encdec.finetune.results_tree import BASELINES
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True)
class ModelEntry:
    """A model by its phases, as a pretraining config lists them. size: a preset; else the base's trunk. schedule: in
    place of the base's."""

    name: str
    phases: list[dict[str, Any]]
    size: str | None = None
    schedule: dict[str, Any] | None = None

    def __post_init__(self):
        if not _NAME.fullmatch(self.name) or self.name == BASELINES:
            raise ValueError(f"name: {self.name!r} cannot name a folder of results; use up to 100 letters, digits and "
                             f"- . _ +, the first a letter or digit, and not {BASELINES}")
        if not self.phases:
            raise ValueError("phases: empty")


@dataclass(frozen=True)
class ContinuedPretraining:
    """How a model goes on from a decayed checkpoint (`clm-dec42k-mlm40-64k`). arXiv 2507.00994 does not state it, so
    all defaults are ours.

    lr: the peak; the base's unless given. warmup_steps, decay_steps: of the new steps; a tenth of the base's warm-up
    and half of its decay unless given. samples: `continue` reads on where the first part stopped; `restart` begins
    the data anew, with a fresh optimizer and step numbers from 1.
    """

    lr: float | None = None
    warmup_steps: int | None = None
    decay_steps: int | None = None
    optimizer_state: Literal["carry", "reset"] = "carry"
    samples: Literal["continue", "restart"] = "continue"

    def __post_init__(self):
        schema.above(self, 0, "lr")
        schema.at_least(self, 0, "warmup_steps", "decay_steps")
        if self.samples == "restart" and self.optimizer_state == "carry":
            raise ValueError("samples: restart begins a new run from the weights alone; it needs "
                             "cpt.optimizer_state: reset")


@dataclass(frozen=True)
class Resources:
    """What one size trains on. ranks: on each of the `nodes`. parallel, micro_size: in place of the base's.
    tokens_per_second: of all ranks together, where known; then the plan says hours."""

    ranks: int = 1
    nodes: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_size: int | None = None
    tokens_per_second: float | None = None

    def __post_init__(self):
        schema.at_least(self, 1, "ranks", "nodes", "micro_size")
        schema.above(self, 0, "tokens_per_second")


@dataclass(frozen=True)
class StudyConfig:
    """A whole study. seeds: of initial weights and data; each makes every model once, named `-sN` (none: the base's).
    checkpoints: steps to score on the way. finetune: keys of a fine-tuning config, `config` names a file with the
    rest; models and results are the study's. resources: by size, `base` for models without one. slurm: parameters of
    submitit's executor."""

    base: str
    output: str
    models: list[str | ModelEntry]
    seeds: tuple[int, ...] = ()
    checkpoints: tuple[int, ...] = ()
    finetune: dict[str, Any] | None = None
    cpt: ContinuedPretraining = field(default_factory=ContinuedPretraining)
    resources: dict[str, Resources] = field(default_factory=dict)
    executor: Literal["local", "slurm"] = "local"
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.models:
            raise ValueError("models: empty; give at least one, e.g. [610m-mlm40-42k]")
        if not self.output:
            raise ValueError("output: empty; name a folder")
        if any(not 0 <= seed < 1 << 63 for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different numbers from 0, found {list(self.seeds)}")
        if any(step < 1 for step in self.checkpoints):
            raise ValueError(f"checkpoints: expected steps from 1, found {list(self.checkpoints)}")


def load_study(path: str | Path, overrides: list[str] = ()) -> StudyConfig:
    """The study file at `path` with `dotted.key=value` overrides; `base`, `output` and `finetune.config` as paths from
    here."""
    data = schema.load_yaml(path)
    for override in overrides:
        schema.apply_override(data, override, StudyConfig)
    study = schema.build(StudyConfig, data)
    return replace(study, base=_beside(path, study.base), output=_beside(path, study.output),
                   finetune=None if study.finetune is None else _fine_tuning(path, study.finetune))


def _beside(path: str | Path, name: str) -> str:
    return os.path.normpath(Path(path).parent / name)


def _fine_tuning(path: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """The fine-tuning config's keys: those given over those of the file `config`."""
    given = dict(given)
    for key in ("models", "model", "results"):
        if key in given:
            raise UserError(f"finetune.{key}: is the study's to fill in; leave it out")
    file = given.pop("config", None)
    if not isinstance(file, str | None):
        raise UserError(f"finetune.config: expected a path, found {file!r}")
    below = schema.load_yaml(_beside(path, file)) if file else {}
    merged = {key: {**below[key], **value} if isinstance(value, dict) and isinstance(below.get(key), dict) else value
              for key, value in given.items()}
    whole = {key: value for key, value in {**below, **merged}.items() if key not in ("models", "model", "results")}
    schema.build(FinetuneConfig, {**whole, "model": "any", "results": "any"}, "finetune")  # a mistake is said now
    return whole
