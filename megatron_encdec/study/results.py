"""Trees of fine-tuning results, in the layout of the paper's published runs (arXiv 2507.00994).

    TREE/<model>/<SC|TC|QA|IR>/<dataset>/lr<LR>_sd<seed>/results.json     {"validation": {"score": 0.92}, "test": ...}
    TREE/<model>/IR/<dataset>/<train set>_lr<LR>_sd<seed>/results.json    such as msmarco_pairs_lr1e-05_sd0
    TREE/<model>/<family>/<dataset>/<run>/failure.json                    {"reason": "..."}: it ran and failed
    TREE/<model>/<family>/<dataset>/grid.json           optional, the plan: {"runs": ["lr1e-05_sd0", ...]}
    TREE/<model>/model.json                                               optional: {"step": 400, "series": "..."}
    TREE/baselines/<family>/<dataset>.json                                see baselines.py

A **cell** is one model on one dataset (retrieval: trained on one set): its runs are learning rates x seeds. A run has
scores, or failed with a reason, or is not there; nothing here fills in or leaves out a run silently.

    1. `read_trees(paths)`     folders -> `Results`: cells, baselines, models' records, what was ignored
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.study.baselines import FAMILIES, FOLDER, Baselines, read_baselines
from megatron_encdec.study.records import read_json, score_of

_RUN = re.compile(r"(?:(?P<train_set>.+)_)?lr(?P<rate>[0-9.eE+-]+)_sd(?P<seed>\d+)")


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
class Run:
    """One fine-tuning run; scores from 0 to 1, or None where `failure` says why there are none."""

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
    runs: dict[tuple[float, int], Run] = field(default_factory=dict)
    planned: set[tuple[float, int]] = field(default_factory=set)

    @property
    def rates(self) -> list[float]:
        """Learning rates of any run or plan, ascending."""
        return sorted({rate for rate, _ in self.runs.keys() | self.planned})

    @property
    def seeds(self) -> list[int]:
        """Seeds of any run or plan, ascending."""
        return sorted({seed for _, seed in self.runs.keys() | self.planned})

    @property
    def finished(self) -> dict[tuple[float, int], Run]:
        """The runs that have scores."""
        return {place: run for place, run in self.runs.items() if run.failure is None}

    @property
    def failures(self) -> list[Run]:
        """The runs that failed, by learning rate and seed."""
        return [run for _, run in sorted(self.runs.items()) if run.failure is not None]

    @property
    def missing(self) -> list[tuple[float, int]]:
        """Places of the grid, this cell's rates x its seeds, that have neither scores nor a failure."""
        return [(rate, seed) for rate in self.rates for seed in self.seeds if (rate, seed) not in self.runs]


@dataclass(frozen=True)
class ModelRecord:
    """What a model's `model.json` says: the pretraining step it was taken at, and the curve that it is a point of."""

    step: int
    series: str | None


@dataclass
class Results:
    """Everything that was read. `ignored` holds a line for each folder that is no part of the layout."""

    cells: dict[CellKey, Cell] = field(default_factory=dict)
    baselines: dict[tuple[str, str], Baselines] = field(default_factory=dict)
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
    """Read `trees` into one `Results`; `notice(runs so far)` is called after each dataset.

    Raises `UserError`, one line that names the file: a tree that is not there or holds no run, a malformed file or
    run folder, the same run or baseline given twice.
    """
    results, runs = Results(), 0
    for tree in map(Path, trees):
        if not tree.is_dir():
            raise UserError(f"{tree}: no such directory; give a tree of results (<model>/<SC|TC|QA|IR>/<dataset>/...)")
        before = runs
        for model in _folders(tree):
            if model.name == FOLDER:
                continue
            for dataset in _datasets(model, results):
                runs += _read_dataset(results, dataset)
                notice(runs)
        if runs == before:
            raise UserError(f"{tree}: no run found: expected <model>/<SC|TC|QA|IR>/<dataset>/lr<LR>_sd<seed>/"
                            f"results.json{_hint(tree)}")
        _add_baselines(results, tree)
    return results


def _hint(tree: Path) -> str:
    if any((tree / family).is_dir() for family in FAMILIES):
        return f"; this is the folder of one model, give {tree.resolve().parent}"
    return ""


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
    if (record := model / "model.json").is_file():
        results.records[model.name] = _record(record)
    return [dataset for family in families for dataset in _folders(family)]


def _record(path: Path) -> ModelRecord:
    record = read_json(path)
    step, series = record.get("step"), record.get("series")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UserError(f"{path}: step: expected the number of pretraining steps, found {step!r}")
    if series is not None and not isinstance(series, str):
        raise UserError(f"{path}: series: expected a name, found {series!r}")
    return ModelRecord(step, series)


def _read_dataset(results: Results, dataset: Path) -> int:
    """Add the runs of one model on one dataset; how many there were."""
    count = 0
    results.ignored += [f"{file}: outside of any run's folder" for name in ("results.json", "failure.json")
                        if (file := dataset / name).is_file()]
    for folder in _folders(dataset):
        scores, failure = folder / "results.json", folder / "failure.json"
        if not scores.is_file() and not failure.is_file():
            if not _RUN.fullmatch(folder.name):
                results.ignored.append(f"{folder}: not called lr<LR>_sd<seed>, and no results.json in it")
            continue  # not finished, or never begun: it shows as missing where the grid has a place for it
        train_set, rate, seed = _place(folder)
        cell = _cell(results, dataset, train_set)
        if (earlier := cell.runs.get((rate, seed))) is not None:
            raise UserError(f"{folder}: this run is given twice, also by {earlier.path.parent}; leave one out")
        cell.runs[rate, seed] = _run(rate, seed, scores if scores.is_file() else failure)
        count += 1
    if (grid := dataset / "grid.json").is_file():
        _add_plan(results, dataset, grid)
    return count


def _cell(results: Results, dataset: Path, train_set: str) -> Cell:
    key = CellKey(dataset.parent.name, dataset.name, train_set, dataset.parent.parent.name)
    return results.cells.setdefault(key, Cell(key))


def _add_plan(results: Results, dataset: Path, grid: Path) -> None:
    names = read_json(grid).get("runs")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{grid}: runs: expected a list of folder names such as lr1e-05_sd0, found {names!r}")
    for name in names:
        train_set, rate, seed = _place(Path(name), grid)
        _cell(results, dataset, train_set).planned.add((rate, seed))


def _place(folder: Path, file: Path | None = None) -> tuple[str, float, int]:
    """Train set, learning rate and seed, from the folder's name, which stands in `file` if that is given."""
    match = _RUN.fullmatch(folder.name)
    try:
        rate = float(match["rate"]) if match else 0.0
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < math.inf:
        raise UserError(f"{f'{file}: ' if file else ''}{folder}: expected a run's folder to be called lr<LR>_sd<seed>, "
                        "such as lr1e-05_sd0")
    return match["train_set"] or "", rate, int(match["seed"])


def _run(rate: float, seed: int, path: Path) -> Run:
    record = read_json(path)
    if path.name == "results.json":
        for split in ("validation", "test"):  # scores of single examples: kept for others, not read here
            if isinstance(part := record.get(split), dict) and not isinstance(part.get("scores_i", []), list):
                raise UserError(f"{path}: {split}.scores_i: expected a list")
        return Run(rate, seed, score_of(record, "validation", path), score_of(record, "test", path), None, path)
    reason = record.get("reason")
    if not isinstance(reason, str) or not reason:
        raise UserError(f"{path}: reason: expected a sentence, found {reason!r}")
    return Run(rate, seed, None, None, reason, path)


def _add_baselines(results: Results, tree: Path) -> None:
    for task, found in read_baselines(tree).items():
        earlier = results.baselines.get(task)
        if earlier is not None and earlier.scores != found.scores:
            raise UserError(f"{found.path}: other scores than in {earlier.path}; leave one of the two out")
        results.baselines[task] = found
