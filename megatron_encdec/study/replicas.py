"""Recipes: models that differ in the seed of pretraining alone. A study's `seeds` name them `-s0`, `-s1`, ...

    1. `by_recipe(of_model)`           a number of each model, as numbers of its recipe's seeds; `gains` of two recipes
    2. `score_tables(analysis)`        test scores of recipes, and the differences of any two
    3. `loss_tables(losses)`           the same of validation losses
    4. `recipe_pictures(tables)`       both as dots with their intervals

A recipe's number is the mean of its models' numbers. Two recipes are compared seed by seed: models of one seed begin
with the same weights and read the same text. Intervals are Student's: three seeds of pretraining ask for a factor of
4.30 where fine-tuning has 1.96, and seeds of fine-tuning say nothing of how another pretraining would have ended.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from megatron_encdec.page.drawing import STYLE, Picture, colour, dots, panels
from megatron_encdec.page.tables import INTERVALS, Column, Interval, Table
from megatron_encdec.platform.optional import require
from megatron_encdec.study.analysis import Analysis
from megatron_encdec.study.results import natural
from megatron_encdec.study.statistics import student

_OF_SEED = re.compile(r"(?P<recipe>.+)-s(?P<seed>0|[1-9][0-9]*)(?P<step>@[0-9]+)?")  # as `seeds` write it
Values = dict[str, dict[int, float]]  # recipe -> seed -> number of its model
_NOTE = ("Mean over the seeds of pretraining ± Student's 95 % interval. {}Pairs are compared seed by seed, the better "
         "one first: models of one seed begin with the same weights and read the same text.")


def recipes(models: Iterable[str]) -> dict[str, dict[int, str]]:
    """Those that have several seeds, in natural order; `a-s1@400` is of the recipe `a@400`."""
    found: dict[str, dict[int, str]] = {}
    for model in models:
        if match := _OF_SEED.fullmatch(model):
            found.setdefault(match["recipe"] + (match["step"] or ""), {})[int(match["seed"])] = model
    return {recipe: found[recipe] for recipe in sorted(found, key=natural) if len(found[recipe]) > 1}


def by_recipe(of_model: Mapping[str, float]) -> Values:
    """Numbers of models as those of their recipes."""
    return {recipe: {seed: of_model[model] for seed, model in models.items()}
            for recipe, models in recipes(of_model).items()}


def gains(values: Values, one: str, other: str) -> list[float]:
    """`one` minus `other`, for each seed that both have."""
    first, second = values.get(one, {}), values.get(other, {})
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def score_tables(analysis: Analysis) -> list[Table]:
    """Test scores by dataset, and every difference."""
    tasks = analysis.results.tasks
    values = [by_recipe({summary.model: summary.score.mean for summary in analysis.cells([task]) if summary.score})
              for task in tasks]
    labels = [[task[0], analysis.label(task)] for task in tasks]
    return _tables("recipes", "Test scores of recipes", [Column(label, "interval", family) for family, label in labels],
                   values, [Column("family"), Column("dataset")], labels, 1,
                   "Per cent; of each model the mean over its seeds of fine-tuning. ")


def loss_tables(losses: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """losses: of each model at its end, by what was asked of it."""
    names = list(dict.fromkeys(name for found in losses.values() for name in found))
    values = [by_recipe({model: found[name] for model, found in losses.items() if name in found}) for name in names]
    return _tables("recipe_losses", "Validation losses of recipes", [Column(name, "interval number") for name in names],
                   values, [Column("loss")], [[name] for name in names], -1, "Nats a label. ")


def _tables(name: str, title: str, columns: list[Column], values: list[Values], before: list[Column],
            labels: list[list[str]], sign: int, what: str) -> list[Table]:
    """A column for each of `values`, the pairs of each after its `labels`. sign: 1 where more is better, else -1."""
    note, found = _NOTE.format(what), sorted({recipe for one in values for recipe in one}, key=natural)
    rows = [[recipe, max(len(one.get(recipe, {})) for one in values),
             *(student(list(one.get(recipe, {}).values())) for one in values)] for recipe in found]
    compared = [[*label, *pair] for label, one in zip(labels, values, strict=True) for pair in _pairs(one, sign)]
    kind = columns[0].kind.replace("interval", "signed") if columns else "signed"
    pairs = [*before, Column("recipe A"), Column("recipe B"), Column("A − B", kind), Column("seeds", "count"),
             Column("A better", "count"), Column("verdict")]
    return [table for table in (
        Table(name, title, [Column("recipe"), Column("seeds", "count"), *columns], rows, note),
        Table(f"{name}_compared", f"{title}, compared", pairs, compared, note)) if table.rows]


def _pairs(values: Values, sign: int) -> list[list[Any]]:
    """[one, other, difference, seeds, in how many of them `one` is better, verdict], the better one first."""
    found = []
    for one, other in combinations(values, 2):
        differences = gains(values, one, other)
        if sign * sum(differences) < 0:
            one, other, differences = other, one, [-gain for gain in differences]
        if differences:
            found.append([one, other, student(differences), len(differences),
                          sum(sign * gain > 0 for gain in differences), verdict(student(differences))])
    return found


def verdict(difference: Interval) -> str:
    """Whether the interval of a difference leaves out zero."""
    if difference.half_width is None:
        return "one seed: not known"
    return "apart" if difference.excludes_zero else "not apart"


def recipe_pictures(tables: Mapping[str, Table]) -> list[Picture]:
    """Of those that `score_tables` and `loss_tables` made, a panel for each dataset or loss."""
    found = []
    for name, axis_label in (("recipes", "test score, %"), ("recipe_losses", "nats a label")):
        if (table := tables.get(name)) is None:
            continue
        columns = [(place, column) for place, column in enumerate(table.columns) if column.kind in INTERVALS]
        rows = [row[0] for row in table.rows]
        hues = {row: colour(place) for place, row in enumerate(rows)}
        with require("matplotlib", "study report").rc_context(STYLE):
            figure, axes = panels([column.name for _, column in columns], 1.15 + 0.3 * len(rows), rows)
            for axis, (place, column) in zip(axes, columns, strict=True):
                factor = INTERVALS[column.kind]
                dots(axis, rows, {row[0]: (factor * row[place].mean, factor * (row[place].half_width or 0.0))
                                  for row in table.rows if row[place] is not None},
                     hues.get)
                axis.set_xlabel(axis_label)
        found.append(Picture(name, "recipes", table.title,
                             "Mean over the seeds of pretraining and Student's 95 % interval.", figure))
    return found
