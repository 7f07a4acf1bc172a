"""Statistics of fine-tuning scores, as the paper computes them (arXiv 2507.00994; PAPER's rule checked on its runs).

    1. `select(cell)`               for each seed the learning rate with the best *validation* score
    2. `summarise(cell)`            mean of those *test* scores over seeds, and 1.96 * std(ddof=1) / sqrt(n)
    3. `compare(a, b)`              two models on one task: the mean difference over the seeds that both have, likewise
    4. `sensitivity(cell)`          how far test scores spread over learning rates, seed by seed: the stability claim
    5. `average(summaries)`         over the datasets of a family, seed by seed

Nothing is averaged away: what a number leaves out (failed and missing runs, seeds without a partner) stands beside it.
Scores are fractions from 0 to 1 throughout; tables print per cent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_encdec.study.results import Cell, RunScores

Z = 1.96  # of a normal distribution: with five seeds Student's t would give 2.776, the paper does not


@dataclass(frozen=True)
class Interval:
    """`mean` of `count` values and `half_width` of its interval; None where one value tells nothing of spread."""

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def interval(values: Sequence[float]) -> Interval:
    """Mean and 1.96 * std(ddof=1) / sqrt(n) of at least one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, None, count)
    return Interval(mean, Z * deviation(values) / math.sqrt(count), count)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (ddof = 1) of at least two values."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def select(cell: Cell) -> dict[int, RunScores]:
    """{seed: its finished run with the best validation score}; of equals the one with the lowest learning rate."""
    best: dict[int, RunScores] = {}
    for (_, seed), run in sorted(cell.finished.items()):  # by learning rate
        if seed not in best or run.validation > best[seed].validation:
            best[seed] = run
    return dict(sorted(best.items()))


@dataclass(frozen=True)
class Summary:
    """A cell's score. `score` is None where no run finished; `seeds_lost` have no finished run at all."""

    cell: Cell
    selected: dict[int, RunScores]
    score: Interval | None
    seeds_lost: list[int]

    @property
    def by_seed(self) -> dict[int, float]:
        """The selected test score of each seed."""
        return {seed: run.test for seed, run in self.selected.items()}

    @property
    def is_complete(self) -> bool:
        """Whether every run of the cell's grid finished."""
        return not self.cell.failures and not self.cell.missing


def summarise(cell: Cell) -> Summary:
    """The paper's number for one cell."""
    selected = select(cell)
    scores = [run.test for run in selected.values()]
    return Summary(cell, selected, interval(scores) if scores else None,
                   [seed for seed in cell.seeds if seed not in selected])


@dataclass(frozen=True)
class Comparison:
    """Scores of `a` minus those of `b` over the `seeds` that both have; `wins` of them are above zero."""

    a: str
    b: str
    difference: Interval
    seeds: list[int]
    wins: int
    seeds_unpaired: list[int]


def compare(a: Summary, b: Summary) -> Comparison | None:
    """Paired comparison over seeds of two models on one task; None where no seed is in both."""
    ours, theirs = a.by_seed, b.by_seed
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    return Comparison(a.cell.key.model, b.cell.key.model, interval(differences), seeds,
                      sum(value > 0 for value in differences), sorted(ours.keys() ^ theirs.keys()))


@dataclass(frozen=True)
class Sensitivity:
    """How a cell's test scores depend on the learning rate.

    by_rate: mean over seeds at each rate. spread: best minus worst rate of a seed, over seeds. deviation: standard
    deviation (ddof=1) over the rates of a seed, over seeds. Both only over the seeds whose runs finished at every rate
    (`spread` is None without any); `seeds_left_out` are the others.
    """

    by_rate: dict[float, Interval]
    spread: Interval | None
    deviation: Interval | None
    seeds_left_out: list[int]


def sensitivity(cell: Cell) -> Sensitivity | None:
    """None where the cell has fewer than two learning rates."""
    rates, finished = cell.rates, cell.finished
    if len(rates) < 2:
        return None
    by_rate = {rate: [run.test for (one, _), run in sorted(finished.items()) if one == rate] for rate in rates}
    whole = [seed for seed in cell.seeds if all((rate, seed) in finished for rate in rates)]
    scores = [[finished[rate, seed].test for rate in rates] for seed in whole]
    return Sensitivity(
        {rate: interval(values) for rate, values in by_rate.items() if values},
        interval([max(row) - min(row) for row in scores]) if scores else None,
        interval([deviation(row) for row in scores]) if scores else None,
        [seed for seed in cell.seeds if seed not in whole])


@dataclass(frozen=True)
class Average:
    """A model's mean over datasets; `seeds_left_out` have not finished on all of them."""

    score: Interval | None
    seeds_left_out: list[int]


def average(by_dataset: Mapping[str, Summary]) -> Average:
    """Mean over the datasets of a family: for each seed over datasets, then over the seeds that have them all.

    The mean equals that of the datasets' means where all have the same seeds, as in the paper's tables.
    """
    scores = [summary.by_seed for summary in by_dataset.values()]
    everywhere = sorted(set.intersection(*(set(one) for one in scores)))
    somewhere = set.union(*(set(summary.cell.seeds) for summary in by_dataset.values()))
    means = [math.fsum(one[seed] for one in scores) / len(scores) for seed in everywhere]
    return Average(interval(means) if means else None, sorted(somewhere - set(everywhere)))
