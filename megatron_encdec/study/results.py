"""Trees of fine-tuning results (layout: finetune/results_tree.py), read as a whole.

A **cell** is one model on one dataset (retrieval: trained on one set): its runs are learning rates x seeds. A run has
scores, or failed with a reason, or is not there; nothing here fills in or leaves out a run silently.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_encdec.finetune import results_tree
from megatron_encdec.finetune.results_tree import FAMILIES
from megatron_encdec.platform.errors import UserError


@dataclass(frozen=True, order=True)
class CellKey:
    """What a cell is of; `train_set` is empty except for retrieval."""

    family: str
    dataset: str
    train_set: str
    model: str

    @property
    def task(self) -> tuple[str, str, str]:
        """The key without its model: what models are compared on."""
        return self.family, self.dataset, self.train_set


@dataclass(frozen=True)
class RunScores:
    """What one fine-tuning run came to; scores from 0 to 1, or None where `failure` says why there are none."""

    rate: float
    seed: int
    validation: float | None
    test: float | None
    failure: str | None
    path: Path


@dataclass
class Cell:
    """All runs of a model on a dataset, by (learning rate, seed); `planned` are those that its grid.json lists."""

    key: CellKey
    runs: dict[tuple[float, int], RunScores] = field(default_factory=dict)
    planned: set[tuple[float, int]] = field(default_factory=set)

    @property
    def rates(self) -> list[float]:
        return sorted({rate for rate, _ in self.runs.keys() | self.planned})

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.runs.keys() | self.planned})

    @property
    def finished(self) -> dict[tuple[float, int], RunScores]:
        return {place: run for place, run in self.runs.items() if run.failure is None}

    @property
    def failures(self) -> list[RunScores]:
        return [run for _, run in sorted(self.runs.items()) if run.failure is not None]

    @property
    def missing(self) -> list[tuple[float, int]]:
        """Places of the grid, this cell's rates x its seeds, that have neither scores nor a failure."""
        return [(rate, seed) for rate in self.rates for seed in self.seeds if (rate, seed) not in self.runs]


@dataclass(frozen=True)
class ModelRecord:
    """What a model's `model.json` says: the pretraining step it was taken at, the curves that it is a point of, and
    what its run did up to there (the `run` of export.json)."""

    step: int
    series: tuple[str, ...] = ()
    run: dict[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """All that was read. baselines: test scores (0 to 1) by (family, dataset) and name. ignored: a line a folder."""

    cells: dict[CellKey, Cell] = field(default_factory=dict)
    baselines: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    records: dict[str, ModelRecord] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Names of all models, in natural order (2k before 10k)."""
        return sorted({key.model for key in self.cells}, key=natural)

    @property
    def tasks(self) -> list[tuple[str, str, str]]:
        """All (family, dataset, train set), families in the paper's order."""
        return sorted({key.task for key in self.cells}, key=lambda task: (FAMILIES.index(task[0]), *task[1:]))

    def of_task(self, task: tuple[str, str, str]) -> list[Cell]:
        """The cells of one task, in the order of `models`."""
        found = [cell for key, cell in self.cells.items() if key.task == task]
        return sorted(found, key=lambda cell: natural(cell.key.model))


def natural(name: str) -> list:
    """A sort key by which `mlm-9k` comes before `mlm-42k`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_trees(trees: Sequence[str | Path], notice: Callable[[int], None] = lambda runs: None) -> Results:
    """Read `trees` into one `Results`; `notice(runs so far)` is called after each dataset. Raises `UserError`: a tree
    that is not there or holds no run, a malformed file or run folder, the same run or baseline given twice."""
    results, runs, baseline_files = Results(), 0, {}
    for tree in map(Path, trees):
        if not tree.is_dir():
            raise UserError(f"{tree}: no such directory; give a tree of results (<model>/<SC|TC|QA|IR>/<dataset>/...)")
        before = runs
        for model in _folders(tree):
            if model.name == results_tree.BASELINES:
                continue
            for dataset in _datasets(model, results):
                runs += _read_dataset(results, dataset)
                notice(runs)
        if runs == before:
            inside = any((tree / family).is_dir() for family in FAMILIES)
            hint = f"; this is the folder of one model, give {tree.resolve().parent}" if inside else ""
            raise UserError(f"{tree}: no run found: expected <model>/<SC|TC|QA|IR>/<dataset>/lr<LR>_sd<seed>/"
                            f"results.json{hint}")
        for path in sorted((tree / results_tree.BASELINES).glob("*/*.json")):
            key, scores = (path.parent.name, path.stem), _baseline_scores(path)
            earlier = baseline_files.setdefault(key, path)
            if results.baselines.setdefault(key, scores) != scores:
                raise UserError(f"{path}: other scores than in {earlier}; leave one of the two out")
    return results


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith((".", "_")))


def _datasets(model: Path, results: Results) -> list[Path]:
    """The dataset folders of a model; its record is read on the way."""
    families = [folder for folder in _folders(model) if folder.name in FAMILIES]
    others = [folder for folder in _folders(model) if folder.name not in FAMILIES]
    if not families:
        results.ignored.append(f"{model}: no folder {', '.join(FAMILIES)} in it, so no model's results")
        return []
    results.ignored += [f"{folder}: not a family ({', '.join(FAMILIES)})" for folder in others]
    if (record := model / results_tree.MODEL).is_file():
        results.records[model.name] = _record(record)
    return [dataset for family in families for dataset in _folders(family)]


def _record(path: Path) -> ModelRecord:
    record = results_tree.read_json(path)
    step, series = record.get("step"), record.get("series")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UserError(f"{path}: step: expected the number of pretraining steps, found {step!r}")
    series = [series] if isinstance(series, str) else series or []
    if not isinstance(series, list) or not all(isinstance(name, str) for name in series):
        raise UserError(f"{path}: series: expected a name or a list of names, found {series!r}")
    return ModelRecord(step, tuple(series), record.get("run") or {})


def _read_dataset(results: Results, dataset: Path) -> int:
    """Add the runs of one model on one dataset; how many there were."""
    count = 0
    results.ignored += [f"{file}: outside of any run's folder" for name in (results_tree.RESULTS, results_tree.FAILURE)
                        if (file := dataset / name).is_file()]
    for folder in _folders(dataset):
        scores, failure = folder / results_tree.RESULTS, folder / results_tree.FAILURE
        if not scores.is_file() and not failure.is_file():
            if results_tree.place_of_run(folder.name) is None:
                results.ignored.append(f"{folder}: not called lr<LR>_sd<seed>, and no results.json in it")
            continue  # not finished, or never begun: it shows as missing where the grid has a place for it
        cell, place = _cell(results, dataset, folder.name, str(folder))
        if (earlier := cell.runs.get(place)) is not None:
            raise UserError(f"{folder}: this run is given twice, also by {earlier.path.parent}; leave one out")
        if scores.is_file():
            cell.runs[place] = RunScores(*place, *results_tree.read_scores(scores), None, scores)
        else:
            cell.runs[place] = RunScores(*place, None, None, results_tree.read_reason(failure), failure)
        count += 1
    if (grid := dataset / results_tree.GRID).is_file():
        for name in results_tree.planned(grid):
            cell, place = _cell(results, dataset, name, f"{grid}: {name}")
            cell.planned.add(place)
    return count


def _cell(results: Results, dataset: Path, name: str, where: str) -> tuple[Cell, tuple[float, int]]:
    """The cell of the run called `name`, and the run's learning rate and seed."""
    if (found := results_tree.place_of_run(name)) is None:
        raise UserError(f"{where}: expected a run's folder to be called lr<LR>_sd<seed>, such as lr1e-05_sd0")
    train_set, rate, seed = found
    key = CellKey(dataset.parent.name, dataset.name, train_set, dataset.parent.parent.name)
    return results.cells.setdefault(key, Cell(key)), (rate, seed)


def _baseline_scores(path: Path) -> dict[str, float]:
    if path.parent.name not in FAMILIES:
        raise UserError(f"{path}: the folder of a baseline is a family, one of {', '.join(FAMILIES)}")
    record = results_tree.read_json(path)
    named, metric = record.get("baselines"), record.get("metric")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{path}: expected a mapping 'baselines' of names to {{'test': {{'score': ...}}}}")
    if metric is not None and not isinstance(metric, str):
        raise UserError(f"{path}: 'metric' is a name, found {metric!r}")
    return {name: results_tree.score_of(value, "test", path, f"baselines.{name}.") for name, value in named.items()}
