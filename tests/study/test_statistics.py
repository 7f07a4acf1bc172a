"""Statistics against the published number, numbers computed by hand, numpy, and properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_trees import write_grid, write_recorded, write_run

from megatron_encdec.study.results import Cell, CellKey, RunScores, read_trees
from megatron_encdec.study.statistics import average, compare, interval, select, sensitivity, summarise

SCORES = st.floats(0.0, 1.0)


def cell_of(scores: dict[tuple[float, int], tuple[float, float] | None], model: str = "m") -> Cell:
    """{(rate, seed): (validation, test), or None for a failed run}."""
    cell = Cell(CellKey("SC", "x", "", model))
    for (rate, seed), pair in scores.items():
        cell.runs[rate, seed] = RunScores(rate, seed, *(pair or (None, None)), None if pair else "diverged", None)
    return cell


def test_the_papers_cell(tmp_path):
    """91.1009 ± 0.3867: selection for each seed by validation, mean and interval over test (the paper prints 91.10)."""
    write_recorded(tmp_path)
    cell = next(iter(read_trees([tmp_path]).cells.values()))
    score = summarise(cell).score
    assert (round(100 * score.mean, 4), round(100 * score.half_width, 4), score.count) == (91.1009, 0.3867, 5)
    assert {seed: run.rate for seed, run in select(cell).items()} == {0: 5e-5, 1: 5e-5, 2: 5e-5, 3: 1e-4, 4: 5e-5}


def test_selection_is_by_validation_and_for_each_seed():
    cell = cell_of({(1e-5, 0): (0.9, 0.1), (2e-5, 0): (0.8, 0.99), (1e-5, 1): (0.5, 0.3), (2e-5, 1): (0.6, 0.4)})
    assert {seed: run.test for seed, run in select(cell).items()} == {0: 0.1, 1: 0.4}


def test_equal_validation_takes_the_lowest_rate():
    cell = cell_of({(5e-4, 0): (0.9, 0.1), (1e-5, 0): (0.9, 0.2), (2e-5, 0): (0.9, 0.3)})
    assert select(cell)[0].rate == 1e-5


def test_interval_by_hand():
    found = interval([0.1, 0.2, 0.6])  # mean 0.3, squares 0.04 + 0.01 + 0.09, variance 0.07
    assert found.mean == pytest.approx(0.3)
    assert found.half_width == pytest.approx(1.96 * math.sqrt(0.07) / math.sqrt(3))
    assert interval([0.4]).half_width is None
    assert interval([0.1, 0.3]).excludes_zero and not interval([-0.1, 0.3]).excludes_zero
    assert not interval([0.3]).excludes_zero


def test_against_scipy():
    """Recorded from scipy 1.17: stats.sem(A) and stats.ttest_rel(A, B).statistic."""
    a, b = [0.910, 0.909, 0.907, 0.911, 0.919], [0.900, 0.902, 0.909, 0.901, 0.906]
    assert interval(a).half_width == pytest.approx(1.96 * 0.002059126028197405)
    one, two = (summarise(cell_of({(1e-5, seed): (0.5, test) for seed, test in enumerate(row)})) for row in (a, b))
    difference = compare(one, two).difference
    assert 1.96 * difference.mean / difference.half_width == pytest.approx(2.944940181510078)


@given(st.lists(SCORES, min_size=2, max_size=12))
def test_interval_against_numpy(values):
    found = interval(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half_width == pytest.approx(1.96 * np.std(values, ddof=1) / np.sqrt(len(values)), abs=1e-12)


@given(st.lists(SCORES, min_size=1, max_size=8), st.randoms())
def test_interval_knows_no_order(values, random):
    shuffled = random.sample(values, len(values))
    assert interval(values).mean == interval(shuffled).mean  # fsum: to the last bit
    assert min(values) - 1e-12 <= interval(values).mean <= max(values) + 1e-12


@given(st.dictionaries(st.tuples(st.sampled_from([1e-5, 2e-5, 1e-4]), st.integers(0, 3)), st.tuples(SCORES, SCORES),
                       min_size=1))
def test_selection_properties(scores):
    cell = cell_of(scores)
    selected = select(cell)
    assert set(selected) == {seed for _, seed in scores}
    for seed, run in selected.items():
        validations = [pair[0] for (_, one), pair in scores.items() if one == seed]
        assert run.validation == max(validations) and scores[run.rate, seed] == (run.validation, run.test)


def test_failures_and_missing_runs_are_said():
    cell = cell_of({(1e-5, 0): (0.5, 0.5), (2e-5, 0): None, (1e-5, 1): None, (1e-5, 2): (0.7, 0.8)})
    summary = summarise(cell)
    assert summary.score.mean == pytest.approx(0.65) and summary.score.count == 2
    assert summary.seeds_lost == [1] and summary.lacks_runs
    assert [(run.rate, run.seed) for run in cell.failures] == [(1e-5, 1), (2e-5, 0)]
    assert cell.missing == [(2e-5, 1), (2e-5, 2)]


def test_nothing_finished_is_no_score():
    assert summarise(cell_of({(1e-5, 0): None})).score is None


def test_paired_comparison_by_hand():
    a = summarise(cell_of({(1e-5, seed): (test, test) for seed, test in enumerate([0.9, 0.8, 0.7, 0.5])}, "a"))
    b = summarise(cell_of({(1e-5, seed): (test, test) for seed, test in enumerate([0.8, 0.75, 0.72])}, "b"))
    found = compare(a, b)  # differences 0.10, 0.05, -0.02; mean 0.13 / 3
    assert found.difference.count == 3 and found.wins == 2
    assert found.difference.mean == pytest.approx(0.13 / 3)
    assert found.difference.half_width == pytest.approx(1.96 * np.std([0.10, 0.05, -0.02], ddof=1) / np.sqrt(3))
    back = compare(b, a)
    assert back.difference.mean == -found.difference.mean and back.difference.half_width == pytest.approx(
        found.difference.half_width)


def test_pairing_sees_what_separate_intervals_do_not():
    """Seeds move both models together: the difference is sure where the two intervals overlap."""
    tests = [0.60, 0.70, 0.80, 0.90]
    a = summarise(cell_of({(1e-5, seed): (0.5, test + 0.02) for seed, test in enumerate(tests)}))
    b = summarise(cell_of({(1e-5, seed): (0.5, test) for seed, test in enumerate(tests)}))
    assert a.score.mean - a.score.half_width < b.score.mean + b.score.half_width
    assert compare(a, b).difference.excludes_zero


def test_comparison_without_common_seeds():
    a, b = summarise(cell_of({(1e-5, 0): (0.5, 0.5)})), summarise(cell_of({(1e-5, 1): (0.5, 0.5)}))
    assert compare(a, b) is None


def test_sensitivity_by_hand():
    cell = cell_of({(1e-5, 0): (0.5, 0.5), (2e-5, 0): (0.5, 0.9), (4e-5, 0): (0.5, 0.7),
                    (1e-5, 1): (0.5, 0.6), (2e-5, 1): (0.5, 0.8), (4e-5, 1): (0.5, 0.7),
                    (1e-5, 2): (0.5, 0.1), (2e-5, 2): None, (4e-5, 2): (0.5, 0.2)})
    found = sensitivity(cell)
    assert found.by_rate[2e-5].mean == pytest.approx(0.85) and found.by_rate[1e-5].count == 3
    assert found.spread.mean == pytest.approx((0.4 + 0.2) / 2) and found.spread.count == 2
    assert found.deviation.mean == pytest.approx((0.2 + 0.1) / 2)


@given(st.lists(SCORES, min_size=6, max_size=6), st.floats(0.001, 0.999))
def test_sensitivity_does_not_change_with_the_level(scores, shift):
    shifted = [score * 0.5 + shift * 0.5 for score in scores]
    half = [score * 0.5 for score in scores]
    places = [(rate, seed) for rate in (1e-5, 2e-5, 4e-5) for seed in (0, 1)]
    a, b = (sensitivity(cell_of({place: (0.5, test) for place, test in zip(places, row, strict=True)}))
            for row in (half, shifted))
    assert a.spread.mean == pytest.approx(b.spread.mean, abs=1e-12)
    assert a.deviation.mean == pytest.approx(b.deviation.mean, abs=1e-12)


def test_one_rate_has_no_sensitivity():
    assert sensitivity(cell_of({(1e-5, 0): (0.5, 0.5)})) is None


def test_average_over_datasets(tmp_path):
    write_grid(tmp_path, "a/SC/x", {1e-5: [0.5, 0.7]})
    write_grid(tmp_path, "a/SC/y", {1e-5: [0.6, 0.6]})
    write_run(tmp_path / "a/SC/y/lr1e-05_sd7", 0.9, 0.9)
    found = average([summarise(cell) for cell in read_trees([tmp_path]).cells.values()])
    assert found.mean == pytest.approx(0.6) and found.count == 2  # seed 0: 0.55, seed 1: 0.65; seed 7 lacks a dataset
    assert found.half_width == pytest.approx(1.96 * np.std([0.55, 0.65], ddof=1) / np.sqrt(2))
