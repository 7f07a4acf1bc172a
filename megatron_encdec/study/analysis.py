"""Everything the report shows, computed once: scores, averages, comparisons, sensitivity, curves, and what is amiss.

    1. `analyse(results, reference)`     `Results` -> `Analysis`
    2. `problems(analysis)`              a line for each failed, missing or unequal thing behind the numbers
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_encdec.platform.errors import UserError
from megatron_encdec.study import published
from megatron_encdec.study.checkpoints import curves, shares
from megatron_encdec.study.results import CellKey, Results
from megatron_encdec.study.statistics import (
    Average,
    Comparison,
    Sensitivity,
    Summary,
    average,
    compare,
    sensitivity,
    summarise,
)

Task = tuple[str, str, str]  # family, dataset, train set
ALL_PAIRS = 6  # models up to which every pair is shown; beyond, --reference chooses


@dataclass
class Analysis:
    """The numbers of a report. Where a model has no cell of a task, the key is absent."""

    results: Results
    reference: str | None
    summaries: dict[CellKey, Summary]
    averages: dict[tuple[str, str], Average]  # by (family, model); only where the model has every task of the family
    comparisons: dict[Task, list[Comparison]]
    sensitivities: dict[CellKey, Sensitivity]
    curves: dict[str, list[tuple[int, str]]]
    shares: dict[tuple[str, int], list[tuple[float, str]]]

    def tasks(self, family: str) -> list[Task]:
        """Tasks of one family."""
        return [task for task in self.results.tasks if task[0] == family]

    @property
    def families(self) -> list[str]:
        """Families with any result, in the paper's order."""
        return list(dict.fromkeys(task[0] for task in self.results.tasks))

    def summary(self, task: Task, model: str) -> Summary | None:
        """The summary of a cell, None where there is no such cell."""
        return self.summaries.get(CellKey(*task, model))

    def label(self, task: Task) -> str:
        """What people call the task: the paper's name, or the folder's; with the train set where there are several."""
        family, dataset, train_set = task
        name = published.dataset_name(family, dataset, train_set) or dataset
        several = len({other[2] for other in self.results.tasks if other[:2] == task[:2]}) > 1
        return f"{name} ({train_set or 'no train set'})" if several else name

    def is_papers(self, family: str) -> bool:
        """Whether the family's tasks are the paper's three, so that averages may stand beside its."""
        names = {published.dataset_name(*task) for task in self.tasks(family)}
        return names == set(published.DATASETS[family])

    @property
    def shows_pairs(self) -> bool:
        """Whether every comparison is shown, not only written to CSV."""
        return self.reference is not None or len(self.results.models) <= ALL_PAIRS


def analyse(results: Results, reference: str | None = None) -> Analysis:
    """Compute the report. Raises `UserError` where `reference` names no model of the results."""
    if reference is not None and reference not in results.models:
        raise UserError(f"--reference {reference}: not among the models: {', '.join(results.models)}")
    summaries = {key: summarise(cell) for key, cell in results.cells.items()}
    sensitivities = {key: found for key, cell in results.cells.items() if (found := sensitivity(cell)) is not None}
    models = results.models
    return Analysis(results, reference, summaries, _averages(results, summaries),
                    {task: _comparisons(task, models, summaries, reference) for task in results.tasks},
                    sensitivities, curves(models, results.records), shares(models))


def _averages(results: Results, summaries: dict[CellKey, Summary]) -> dict[tuple[str, str], Average]:
    by_family: dict[str, list[Task]] = defaultdict(list)
    for task in results.tasks:
        by_family[task[0]].append(task)
    found = {}
    for family, tasks in by_family.items():
        for model in results.models:
            keys = [CellKey(*task, model) for task in tasks]
            if all(key in summaries for key in keys):
                found[family, model] = average({key.dataset + key.train_set: summaries[key] for key in keys})
    return found


def _comparisons(task: Task, models: Sequence[str], summaries: dict[CellKey, Summary],
                 reference: str | None) -> list[Comparison]:
    """Against the reference, or every pair with the better model first."""
    cells = {model: summaries[CellKey(*task, model)] for model in models if CellKey(*task, model) in summaries}
    if reference is not None:
        pairs = [(model, reference) for model in cells if model != reference and reference in cells]
    else:
        pairs = [pair if _mean(cells[pair[0]]) >= _mean(cells[pair[1]]) else pair[::-1]
                 for pair in combinations(cells, 2)]
    return [found for a, b in pairs if (found := compare(cells[a], cells[b])) is not None]


def _mean(summary: Summary) -> float:
    return summary.score.mean if summary.score else -1.0


@dataclass(frozen=True)
class Problem:
    """Something a reader of the numbers must know: `kind` in a word or two, `where`, and `what` in a sentence."""

    kind: str
    where: str
    what: str


def problems(analysis: Analysis) -> list[Problem]:
    """Failed runs, missing ones, seeds and averages lost, unequal grids, folders that were ignored."""
    found: list[Problem] = []
    for task in analysis.results.tasks:
        cells = [cell for cell in analysis.results.of_task(task)]
        for cell in cells:
            found += _of_cell(analysis.summaries[cell.key], "/".join((cell.key.model, cell.key.family,
                                                                       analysis.label(task))))
        grids = {(tuple(cell.rates), tuple(cell.seeds)): cell.key.model for cell in cells}
        if len(grids) > 1:
            each = "; ".join(f"{model}: {len(rates)} learning rates × {len(seeds)} seeds ({_seeds(seeds)})"
                             for (rates, seeds), model in grids.items())
            found.append(Problem("unequal grids", f"{task[0]}/{analysis.label(task)}",
                                 f"models were searched differently, which favours the wider grid: {each}"))
    for family in analysis.families:
        for model in analysis.results.models:
            lacking = [analysis.label(task) for task in analysis.tasks(family)
                       if analysis.summary(task, model) is None]
            if 0 < len(lacking) < len(analysis.tasks(family)):
                found.append(Problem("no average", f"{model}/{family}", f"no results on {', '.join(lacking)}"))
    return found + [Problem("ignored", *line.rsplit(": ", 1)) for line in analysis.results.ignored]


def _of_cell(summary: Summary, where: str) -> list[Problem]:
    cell = summary.cell
    found = [Problem("failed", f"{where} {run.path.parent.name}", run.failure) for run in cell.failures]
    if cell.missing:
        names = [f"lr{rate:g}_sd{seed}" for rate, seed in cell.missing]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        found.append(Problem("missing", where, f"{len(names)} of {len(cell.rates) * len(cell.seeds)} runs are not "
                                               f"there: {shown}"))
    if summary.seeds_lost:
        found.append(Problem("seeds lost", where, f"no finished run of seed {_seeds(summary.seeds_lost)}: the score is "
                                                  f"over {len(summary.selected)} of {len(cell.seeds)} seeds"))
    if len(summary.selected) == 1:
        found.append(Problem("one seed", where, "one seed has scores, so there is no interval"))
    return found


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
