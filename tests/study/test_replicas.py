"""Recipes over the seeds of pretraining: who belongs together, Student's interval, differences seed by seed."""

import pytest
from result_trees import write_grid

from megatron_encdec.study.analysis import analyse
from megatron_encdec.study.replicas import loss_tables, recipe_pictures, recipes, score_tables
from megatron_encdec.study.results import read_trees
from megatron_encdec.study.statistics import T, student

SCORES = {"clm-4-mlm40-8": (0.70, 0.75, 0.74), "mlm40-8": (0.68, 0.74, 0.71)}


def trees(tmp_path):
    for recipe, scores in SCORES.items():
        for seed, score in enumerate(scores):
            write_grid(tmp_path, f"{recipe}-s{seed}/SC/library", {1e-3: [score - 0.01, score + 0.01]})
    write_grid(tmp_path, "alone-s0/SC/library", {1e-3: [0.5, 0.6]})
    return analyse(read_trees([tmp_path]))


def test_models_of_one_recipe():
    found = recipes(["mlm40-8-s10", "clm-8-s0@4", "mlm40-8-s2", "clm-8-s1@4", "clm-8-s0", "mlm40-8", "mlm40-8-s",
                     "mlm40-8-s02"])
    assert found == {"clm-8@4": {0: "clm-8-s0@4", 1: "clm-8-s1@4"}, "mlm40-8": {10: "mlm40-8-s10", 2: "mlm40-8-s2"}}


def test_scores_of_recipes(tmp_path):
    """By hand: differences 0.02, 0.01, 0.03; their deviation is 0.01, the half width 4.303 * 0.01 / sqrt(3)."""
    scores, compared = score_tables(trees(tmp_path))
    assert [row[:2] for row in scores.rows] == [["clm-4-mlm40-8", 3], ["mlm40-8", 3]]
    assert scores.rows[1][2].mean == pytest.approx(0.71)
    ((_, _, one, other, difference, seeds, wins, verdict),) = compared.rows
    assert (one, other, seeds, wins, verdict) == ("clm-4-mlm40-8", "mlm40-8", 3, 3, "not apart")
    assert difference.mean == pytest.approx(0.02) and difference.half_width == pytest.approx(4.303 * 0.01 / 3**0.5)


def test_of_losses_the_lower_is_better():
    of_seed = {"a": (4.0, 4.1, 4.2), "b": (4.5, 4.6, 4.7)}
    table, compared = loss_tables({f"{name}-s{seed}": {"mlm": loss} for name, losses in of_seed.items()
                                   for seed, loss in enumerate(losses)})
    assert table.cells(2)[0] == ["a", "3", "4.10 ± 0.25"]
    assert compared.rows[0][:3] == ["mlm", "a", "b"] and compared.rows[0][-2:] == [3, "apart"]
    assert compared.rows[0][3].mean == pytest.approx(-0.5) and compared.cells(2)[0][3] == "-0.50 ± 0.00"


def test_a_seed_that_one_of_two_lacks_is_left_out():
    _, compared = loss_tables({"a-s0": {"mlm": 4.0}, "a-s1": {"mlm": 4.2}, "b-s1": {"mlm": 4.1}, "b-s2": {"mlm": 9.0}})
    assert compared.rows[0][1:3] == ["b", "a"] and compared.rows[0][-3:] == [1, 1, "one seed: not known"]


def test_without_seeds_there_is_nothing(tmp_path):
    write_grid(tmp_path, "mlm40-8/SC/library", {1e-3: [0.5, 0.6]})
    assert score_tables(analyse(read_trees([tmp_path]))) == [] and loss_tables({"mlm40-8": {"mlm": 4.0}}) == []
    assert loss_tables({}) == []


def test_students_factors():
    scipy = pytest.importorskip("scipy.stats")
    assert T == tuple(round(float(scipy.t.ppf(0.975, freedom)), 3) for freedom in range(1, len(T) + 1))


def test_students_interval():
    assert student([]) is None and student([1.0]).half_width is None
    assert student([0.0, 2.0]).half_width == pytest.approx(12.706)  # std is sqrt(2), over sqrt(2)


def test_a_picture_of_each(tmp_path):
    pytest.importorskip("matplotlib")
    tables = {table.name: table for table in score_tables(trees(tmp_path))}
    (picture,) = recipe_pictures(tables)
    axis = picture.figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["clm-4-mlm40-8", "mlm40-8"]
    means = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert means == pytest.approx([73.0, 71.0])
