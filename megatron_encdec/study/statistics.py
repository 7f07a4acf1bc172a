"""Statistics of fine-tuning scores, as the paper computes them (arXiv 2507.00994; checked on its published runs).

    1. `summarise(cell)`       for each seed the learning rate with the best *validation* score; mean of those *test*
                               scores over seeds, and 1.96 * std(ddof=1) / sqrt(n)
    2. `compare(a, b)`         two models on one task: the mean difference over the seeds that both have, likewise
    3. `sensitivity(cell)`     how far test scores spread over learning rates, seed by seed: the stability claim
    4. `average(summaries)`    over the datasets of a family, seed by seed
    5. `student(values)`       mean and Student's interval, for the few seeds of pretraining

Nothing is averaged away: what a number leaves out (failed and missing runs, lost seeds) is listed beside it. Scores are
fractions from 0 to 1 throughout; tables print per cent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megatron_encdec.page.tables import Interval
from megatron_encdec.study.results import Cell, RunScores

Z = 1.96  # of a normal distribution: with five seeds Student's t would give 2.776, the paper does not
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
     2.110, 2.101, 2.093, 2.086)  # of Student's distribution at 97.5 %, from one degree of freedom on


def interval(values: Sequence[float]) -> Interval | None:
    """Mean and 1.96 * std(ddof=1) / sqrt(n); None without values."""
    count = len(values)
    if not count:
        return None
    return Interval(fmean(values), Z * deviation(values) / math.sqrt(count) if count > 1 else None, count)


def student(values: Sequence[float]) -> Interval | None:
    """Mean and the half width of Student's 95 % interval, as wide as the count of values asks for (beyond 21 values as
    for 21); None without values."""
    found = interval(values)
    if found is None or found.half_width is None:
        return found
    return replace(found, half_width=found.half_width / Z * T[min(found.count - 1, len(T)) - 1])


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (ddof = 1) of at least two values. Those of numpy and of the standard library end
    in other digits, and reports in CSV hold every digit."""
    mean = fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True)
class Sensitivity:
    """How a cell's test scores depend on the learning rate. by_rate: mean over seeds at each rate. spread: best minus
    worst rate of a seed, over seeds. deviation: standard deviation (ddof=1) over the rates of a seed, over seeds. Both
    only over the seeds whose runs finished at every rate, and None without any."""

    by_rate: dict[float, Interval]
    spread: Interval | None
    deviation: Interval | None


@dataclass(frozen=True)
class Summary:
    """A cell's numbers: the run `selected` for each seed, the score over them (None where no run finished), and the
    sensitivity (None where there are fewer than two learning rates)."""

    cell: Cell
    selected: dict[int, RunScores]
    score: Interval | None
    sensitivity: Sensitivity | None

    @property
    def model(self) -> str:
        return self.cell.key.model

    @property
    def task(self) -> tuple[str, str, str]:
        return self.cell.key.task

    @property
    def lacks_runs(self) -> bool:
        return bool(self.cell.failures or self.cell.missing)

    @property
    def by_seed(self) -> dict[int, float]:
        return {seed: run.test for seed, run in self.selected.items()}

    @property
    def seeds_lost(self) -> list[int]:
        return [seed for seed in self.cell.seeds if seed not in self.selected]


def summarise(cell: Cell) -> Summary:
    """The paper's number for one cell, as above."""
    selected = select(cell)
    return Summary(cell, selected, interval([run.test for run in selected.values()]), sensitivity(cell))


def select(cell: Cell) -> dict[int, RunScores]:
    """{seed: its finished run with the best validation score}; of equals the one with the lowest learning rate."""
    best: dict[int, RunScores] = {}
    for (_, seed), run in sorted(cell.finished.items()):  # by learning rate
        if seed not in best or run.validation > best[seed].validation:
            best[seed] = run
    return dict(sorted(best.items()))


def sensitivity(cell: Cell) -> Sensitivity | None:
    """None where the cell has fewer than two learning rates."""
    rates, finished = cell.rates, cell.finished
    if len(rates) < 2:
        return None
    by_rate = {rate: interval([finished[rate, seed].test for seed in cell.seeds if (rate, seed) in finished])
               for rate in rates}
    scores = [[finished[rate, seed].test for rate in rates] for seed in cell.seeds
              if all((rate, seed) in finished for rate in rates)]
    return Sensitivity({rate: found for rate, found in by_rate.items() if found is not None},
                       interval([max(row) - min(row) for row in scores]), interval([deviation(row) for row in scores]))


@dataclass(frozen=True)
class Comparison:
    """Scores of `a` minus those of `b` over the seeds that both have; `wins` of them are above zero."""

    a: str
    b: str
    difference: Interval
    wins: int


def compare(a: Summary, b: Summary) -> Comparison | None:
    """Paired comparison over seeds of two models on one task; None where no seed is in both."""
    ours, theirs = a.by_seed, b.by_seed
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    return Comparison(a.model, b.model, interval(differences), sum(one > 0 for one in differences))


def average(summaries: Sequence[Summary]) -> Interval | None:
    """Mean over the datasets of a family: for each seed over datasets, then over the seeds that have them all. Equals
    that of the datasets' means where all have the same seeds, as in the paper's tables."""
    scores = [summary.by_seed for summary in summaries]
    everywhere = sorted(set.intersection(*map(set, scores)))
    return interval([fmean(one[seed] for one in scores) for seed in everywhere])
