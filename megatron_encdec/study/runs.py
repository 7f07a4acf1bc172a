"""What a report says of a study's runs besides their scores: the tree, budgets, validation losses.

    1. `budgets(records)`             steps, tokens, labels and FLOPs of each model: equal in one is not equal in others
    2. `validation(losses)`           validation losses at the end of each model, from its metrics
    3. `budget_pictures(analysis)`     scores over tokens, labels and FLOPs side by side
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_encdec.page.drawing import STYLE, Picture, colour, legend_below, panels
from megatron_encdec.page.tables import Column, Table
from megatron_encdec.platform.optional import require
from megatron_encdec.platform.progress import short_count
from megatron_encdec.rundir.metrics import read_metrics
from megatron_encdec.study.analysis import Analysis
from megatron_encdec.study.curves import described
from megatron_encdec.study.figures import FAMILY_NAMES
from megatron_encdec.study.plan import StudyPlan, describe_path
from megatron_encdec.study.results import ModelRecord
from megatron_encdec.study.store import Store

AXES = {"tokens": "tokens read", "targets": "labels trained on", "flops": "FLOPs"}


def budgets(records: Mapping[str, ModelRecord]) -> Table:
    """A row for each model whose run is on record."""
    rows = [[model, record.step, *(record.run.get(key) for key in AXES)]
            for model, record in records.items() if record.run]
    return Table("budgets", "What each model cost", [
        Column("model"), Column("step", "count"), Column("tokens", "count"), Column("labels", "count"),
        Column("FLOPs", "number")], rows,
        "A CLM step has a label at nearly every token, an MLM step at the masked ones: equal steps are equal tokens, "
        "but neither equal labels nor equal FLOPs. FLOPs with attention over whole windows.")


def paths(plan: StudyPlan) -> Table:
    """Which stretches each model went through."""
    return Table("paths", "The path of each model", [Column("model"), Column("stretches")],
                 [[recipe.name, describe_path(plan, recipe.name)] for recipe in plan.recipes])


def validation_losses(plan: StudyPlan, store: Store) -> dict[str, dict[str, float]]:
    """At the end of each model that has any, under each objective that its run evaluated; in nats a label."""
    ends = {recipe.name: plan.tree.last[recipe.name] for recipe in plan.recipes}
    losses = {model: _losses(store.run_of(last) / "metrics.jsonl", last.end) for model, last in ends.items()}
    return {model: found for model, found in losses.items() if found}


def validation(losses: Mapping[str, Mapping[str, float]]) -> Table:
    """The losses of `validation_losses`, a row a model."""
    names = list(dict.fromkeys(name for found in losses.values() for name in found))
    return Table("validation", "Validation loss at the end of pretraining",
                 [Column("model"), *(Column(name, "number") for name in names)],
                 [[model, *map(found.get, names)] for model, found in losses.items()],
                 "Nats a label, each with the mask ratio of its own run. A model is evaluated under every yardstick, "
                 "trained for it or not.")


def _losses(metrics: Path, step: int) -> dict[str, float]:
    if not metrics.is_file():
        return {}
    found = [one["losses"] for one in read_metrics(metrics, torn_tail=True)
             if one["kind"] == "eval" and one["step"] == step]
    return found[-1] if found else {}


def budget_pictures(analysis: Analysis) -> list[Picture]:
    """For each family: its average over tokens, labels and FLOPs, where two models differ in any of them."""
    records = {model: record for model, record in analysis.results.records.items() if record.run}
    found = []
    for family in analysis.families:
        points = {model: score.percent[0] for model in records if (score := analysis.average(family, model))}
        if len({tuple(records[model].run.get(key) for key in AXES) for model in points}) < 2:
            continue
        with require("matplotlib", "study report").rc_context(STYLE):
            figure, axes = panels(list(AXES.values()), 3.0)
            kinds = {model: _kind(model, records[model]) for model in points}
            for axis, key in zip(axes, AXES, strict=True):
                for place, kind in enumerate(dict.fromkeys(kinds.values())):
                    mine = [model for model in points if kinds[model] == kind]
                    axis.plot([records[model].run[key] for model in mine], [points[model] for model in mine], "o", ms=5,
                              color=colour(place), label=kind)
                axis.set_xlabel(AXES[key])
                axis.locator_params(axis="x", nbins=4)
                if key != "flops":
                    axis.xaxis.set_major_formatter(lambda count, _: short_count(count))
                axis.set_ylabel("average test score, %")
            legend_below(figure)
        found.append(Picture(f"budgets_{family}", "budgets", f"{FAMILY_NAMES[family]}: equal tokens, labels, FLOPs",
                             "The same models three times; models above each other in one panel had equal budgets of "
                             "that kind.", figure))
    return found


def _kind(model: str, record: ModelRecord) -> str:
    """`clm`, `mlm40`, `clm → mlm40`."""
    name = described(model, record)
    return " → ".join(name.objectives) if name else "other"
