"""Recipes: models that differ in the seed of pretraining alone. A study's `seeds` name them `-s0`, `-s1`, ...

    1. `recipes(models)`               recipe -> its model of each seed
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

_OF_SEED = re.compile(r"(?P<recipe>.+)-s(?P<seed>[0-9]+)(?P<step>@[0-9]+)?")
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


def score_tables(analysis: Analysis) -> list[Table]:
    """Test scores by dataset, and every difference."""
    seeds, rows, differences = recipes(analysis.results.models), [], []
    tasks = analysis.results.tasks
    values = {task: _values(seeds, {model: score.mean for model in analysis.results.models
                                    if (score := analysis.score(task, model))}) for task in tasks}
    for recipe in seeds:
        means = [student(list(values[task].get(recipe, {}).values())) for task in tasks]
        rows.append([recipe, max(len(values[task].get(recipe, {})) for task in tasks), *means])
    for task in tasks:
        differences += [[task[0], analysis.label(task), *pair] for pair in _pairs(values[task], higher_is_better=True)]
    return _tables("recipes", "Test scores of recipes", [Column(analysis.label(task), "interval", task[0])
                                                         for task in tasks], rows,
                   [Column("family"), Column("dataset")], differences, "signed",
                   "Per cent; of each model the mean over its seeds of fine-tuning. ")


def loss_tables(losses: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """losses: of each model at its end, by what was asked of it."""
    names = list(dict.fromkeys(name for found in losses.values() for name in found))
    seeds = recipes(losses)
    values = {name: _values(seeds, {model: found[name] for model, found in losses.items() if name in found})
              for name in names}
    rows = [[recipe, len(seeds[recipe]), *(student(list(values[name].get(recipe, {}).values())) for name in names)]
            for recipe in seeds]
    differences = [[name, *pair] for name in names for pair in _pairs(values[name], higher_is_better=False)]
    return _tables("recipe_losses", "Validation losses of recipes", [Column(name, "interval number") for name in names],
                   rows, [Column("loss")], differences, "signed number", "Nats a label. ")


def _values(seeds: Mapping[str, Mapping[int, str]], of_model: Mapping[str, float]) -> Values:
    found = {recipe: {seed: of_model[model] for seed, model in models.items() if model in of_model}
             for recipe, models in seeds.items()}
    return {recipe: values for recipe, values in found.items() if values}


def _pairs(values: Values, higher_is_better: bool) -> list[list[Any]]:
    """[one, other, difference, seeds, in how many of them `one` is better, verdict], the better one first."""
    found = []
    for one, other in combinations(values, 2):
        shared = values[one].keys() & values[other].keys()
        if not shared:
            continue
        gains = [values[one][seed] - values[other][seed] for seed in sorted(shared)]
        if (sum(gains) >= 0) != higher_is_better:
            one, other, gains = other, one, [-gain for gain in gains]
        wins = sum((gain > 0) == higher_is_better and gain != 0 for gain in gains)
        found.append([one, other, student(gains), len(gains), wins, verdict(student(gains))])
    return found


def verdict(difference: Interval) -> str:
    """Whether the interval of a difference leaves out zero."""
    if difference.half_width is None:
        return "one seed: not known"
    return "apart" if difference.excludes_zero else "not apart"


def _tables(name: str, title: str, columns: list[Column], rows: list, before: list[Column], differences: list,
            kind: str, what: str) -> list[Table]:
    note = _NOTE.format(what)
    pairs = [*before, Column("recipe A"), Column("recipe B"), Column("A − B", kind), Column("seeds", "count"),
             Column("A better", "count"), Column("verdict")]
    return [table for table in (
        Table(name, title, [Column("recipe"), Column("seeds", "count"), *columns], rows, note),
        Table(f"{name}_compared", f"{title}, compared", pairs, differences, note)) if table.rows]


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
