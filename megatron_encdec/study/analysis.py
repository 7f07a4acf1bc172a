"""Everything the report shows, computed once: scores, comparisons, sensitivity, curves, and what is amiss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from megatron_encdec.finetune.results_tree import name_of_run
from megatron_encdec.page.tables import Interval
from megatron_encdec.platform.errors import UserError
from megatron_encdec.study import published
from megatron_encdec.study.curves import Curves, curves, ratios, shares
from megatron_encdec.study.results import CellKey, Results
from megatron_encdec.study.statistics import Comparison, Summary, average, compare, summarise

Task = tuple[str, str, str]  # family, dataset, train set


@dataclass
class Analysis:
    """The numbers of a report. Where a model has no cell of a task, the key is absent."""

    results: Results
    reference: str | None
    summaries: dict[CellKey, Summary]
    comparisons: dict[Task, list[Comparison]]
    curves: Curves
    shares: Curves
    ratios: Curves

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(task[0] for task in self.results.tasks))

    def tasks(self, family: str) -> list[Task]:
        return [task for task in self.results.tasks if task[0] == family]

    def cells(self, tasks: Sequence[Task] = ()) -> Iterator[Summary]:
        """The cells of `tasks`, or of all, by task and model."""
        return (self.summaries[cell.key] for task in tasks or self.results.tasks for cell in self.results.of_task(task))

    def summary(self, task: Task, model: str) -> Summary | None:
        return self.summaries.get(CellKey(*task, model))

    def score(self, task: Task, model: str) -> Interval | None:
        """A cell's score; None where there is no such cell or none of its runs finished."""
        return found.score if (found := self.summary(task, model)) else None

    def average(self, family: str, model: str) -> Interval | None:
        """A model's average over the datasets of a family; None where it lacks one."""
        found = [self.summary(task, model) for task in self.tasks(family)]
        return average(found) if found and all(found) else None

    def baselines(self, task: Task) -> dict[str, float]:
        return self.results.baselines.get(task[:2], {})

    def label(self, task: Task) -> str:
        """What people call the task: the paper's name, or the folder's; with the train set where there are several."""
        family, dataset, train_set = task
        name = published.dataset_name(family, dataset, train_set) or dataset
        several = len({other[2] for other in self.results.tasks if other[:2] == task[:2]}) > 1
        return f"{name} ({train_set or 'no train set'})" if several else name


def analyse(results: Results, reference: str | None = None) -> Analysis:
    """Compute the report. Raises `UserError` where `reference` names no model of the results."""
    models = results.models
    if reference is not None and reference not in models:
        raise UserError(f"--reference {reference}: not among the models: {', '.join(models)}")
    summaries = {key: summarise(cell) for key, cell in results.cells.items()}
    comparisons = {task: _comparisons([summaries[cell.key] for cell in results.of_task(task)], reference)
                   for task in results.tasks}
    return Analysis(results, reference, summaries, comparisons, curves(models, results.records),
                    shares(models, results.records), ratios(models, results.records))


def _comparisons(summaries: Sequence[Summary], reference: str | None) -> list[Comparison]:
    """Of one task: against the reference, or every pair with the better model first."""
    if reference is not None:
        pairs = [(one, other) for other in summaries if other.model == reference for one in summaries if one != other]
    else:
        pairs = [sorted(pair, key=lambda one: one.score.mean if one.score else -1.0, reverse=True)
                 for pair in combinations(summaries, 2)]
    return [found for a, b in pairs if (found := compare(a, b)) is not None]


class Problem(NamedTuple):
    """Something a reader of the numbers must know: what in a word or two, where, and the detail in a sentence."""

    what: str
    where: str
    detail: str


def problems(analysis: Analysis) -> list[Problem]:
    """Failed runs, missing ones, seeds and averages lost, unequal grids, folders that were ignored."""
    found = []
    for task in analysis.results.tasks:
        cells, name = analysis.results.of_task(task), f"{task[0]}/{analysis.label(task)}"
        for summary in analysis.cells([task]):
            found += _of_cell(summary, f"{summary.model}/{name}")
        grids = {(tuple(cell.rates), tuple(cell.seeds)): cell.key.model for cell in cells}
        if len(grids) > 1:
            each = "; ".join(f"{model}: {len(rates)} learning rates × {len(seeds)} seeds ({_seeds(seeds)})"
                             for (rates, seeds), model in grids.items())
            found.append(Problem("unequal grids", name,
                                 f"models were searched differently, which favours the wider grid: {each}"))
    for family in analysis.families:
        tasks = analysis.tasks(family)
        for model in analysis.results.models:
            lacking = [analysis.label(task) for task in tasks if analysis.summary(task, model) is None]
            if 0 < len(lacking) < len(tasks):
                found.append(Problem("no average", f"{model}/{family}", f"no results on {', '.join(lacking)}"))
    return found + [Problem("ignored", *line.rsplit(": ", 1)) for line in analysis.results.ignored]


def _of_cell(summary: Summary, where: str) -> list[Problem]:
    cell = summary.cell
    found = [Problem("failed", f"{where} {run.path.parent.name}", run.failure) for run in cell.failures]
    if cell.missing:
        names = [name_of_run(rate, seed) for rate, seed in cell.missing]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        found.append(Problem("missing", where, f"{len(names)} of {len(cell.rates) * len(cell.seeds)} runs are not "
                                               f"there: {shown}"))
    if summary.seeds_lost:
        found.append(Problem("seeds lost", where, f"no finished run of seed {_seeds(summary.seeds_lost)}: the score is "
                                                  f"over {len(summary.selected)} of {len(cell.seeds)} seeds"))
    if len(summary.selected) == 1 and cell.rates != [0.0]:  # a model as it is has no seeds
        found.append(Problem("one seed", where, "one seed has scores, so there is no interval"))
    return found


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
