"""Baselines that cost no encoder: what fine-tuning leaves beside a tree of results, read back.

The format, one file for each dataset, `<results tree>/baselines/<family>/<dataset>.json`:

    {"metric": "accuracy",
     "baselines": {"majority":    {"validation": {"score": 0.55}, "test": {"score": 0.51}},
                   "naive_bayes": {"test": {"score": 0.79}}}}

`family` is SC, TC, QA or IR and `dataset` the folder's name that the dataset has under `<model>/<family>/`. Names of
baselines are free (`majority`, `naive_bayes`, `bm25`, ...); `test.score` is required, from 0 to 1 and in the same
metric as the runs'; `validation` and further keys may stand beside it. `metric` is optional: the report prints it.

    1. `read_baselines(tree)`     {(family, dataset): Baselines}
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.finetune.results_tree import BASELINES, FAMILIES, read_json, score_of
from megatron_encdec.platform.errors import UserError


@dataclass(frozen=True)
class Baselines:
    """Of one dataset: test scores (0 to 1) by the baseline's name, the metric's name or None, and the file."""

    scores: dict[str, float]
    metric: str | None
    path: Path


def read_baselines(tree: Path) -> dict[tuple[str, str], Baselines]:
    """All baselines of `tree`; empty where it has none. Raises `UserError` naming a file that is malformed."""
    return {(path.parent.name, path.stem): _read(path) for path in sorted((tree / BASELINES).glob("*/*.json"))}


def _read(path: Path) -> Baselines:
    if path.parent.name not in FAMILIES:
        raise UserError(f"{path}: the folder of a baseline is a family, one of {', '.join(FAMILIES)}")
    record = read_json(path)
    named = record.get("baselines")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{path}: expected a mapping 'baselines' of names to {{'test': {{'score': ...}}}}")
    metric = record.get("metric")
    if metric is not None and not isinstance(metric, str):
        raise UserError(f"{path}: 'metric' is a name, found {metric!r}")
    scores = {str(name): score_of(value, "test", path, f"baselines.{name}.") for name, value in named.items()}
    return Baselines(scores, metric, path)
