"""The report's figures: scores with intervals, differences, curves over checkpoints and CLM shares, learning rates.

Each family has a figure of each kind, with a panel for each dataset. A model has one colour throughout.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_encdec.page.drawing import COLOURS, INK, MUTED, STYLE, Picture, colour, dots, legend_below, line, panels
from megatron_encdec.page.tables import rate_text
from megatron_encdec.platform.optional import require
from megatron_encdec.study import published
from megatron_encdec.study.analysis import Analysis, Task
from megatron_encdec.study.curves import Curves, short_steps
from megatron_encdec.study.statistics import compare

FAMILY_NAMES = {"SC": "Sequence classification", "TC": "Token classification", "QA": "Question answering",
                "IR": "Retrieval", "MTEB": "MTEB, not trained further"}
DASHES = ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
ROW = 0.3  # inches, of a figure of dots
ALL_PAIRS = 6  # models up to which every pair is shown; of more the CSV has them, and --reference chooses
LINES = 12  # models up to which learning rates are drawn as lines; more are a map of colours
MAP_END = 20.0  # points below the best rate at which that map ends
Drawn = tuple[str, Any] | None  # a caption and its figure; None where there is nothing to show


def all_figures(analysis: Analysis) -> list[Picture]:
    """Every figure that has something to show. Raises `UserError` where matplotlib is not installed."""
    kinds = (("scores", "scores", "test scores", _scores),
             ("differences", "comparisons", "differences over the same seeds", _differences),
             ("checkpoints", "checkpoints", "over checkpoints", _checkpoints),
             ("shares", "checkpoints", "over the CLM share", _shares),
             ("ratios", "checkpoints", "over the mask ratio", _ratios),
             ("learning_rates", "sensitivity", "over learning rates", _rates))
    with require("matplotlib", "study report").rc_context(STYLE):
        return [Picture(f"{name}_{family}", section, f"{FAMILY_NAMES[family]}: {title}", *drawn)
                for family in analysis.families for name, section, title, draw in kinds
                if (drawn := draw(analysis, family)) is not None]


def _panels(analysis: Analysis, tasks: Sequence[Task], height: float, rows: Sequence[str] = ()):
    """A figure with a panel a task, and (task, panel) of each."""
    figure, axes = panels([analysis.label(task) for task in tasks], height, rows)
    return figure, list(zip(tasks, axes, strict=True))


def _scores(analysis: Analysis, family: str) -> Drawn:
    tasks, models = analysis.tasks(family), analysis.results.models
    rows = [model for model in models if any(analysis.summary(task, model) for task in tasks)]
    names = list(dict.fromkeys(name for task in tasks for name in analysis.baselines(task)))
    styles = {name: {"color": MUTED, "lw": 1.3, "ls": DASHES[place % len(DASHES)]} for place, name in enumerate(names)}
    figure, parts = _panels(analysis, tasks, 1.15 + ROW * len(rows), rows)
    has_published = False
    for task, axis in parts:
        scores = {model: score.percent for model in rows if (score := analysis.score(task, model))}
        dots(axis, rows, scores, lambda model: colour(models.index(model)))
        for place, model in enumerate(rows):
            printed = published.CELLS.get((model, published.dataset_name(*task)))
            if printed is not None:
                axis.plot(printed, place, "D", mfc="none", mec=INK, ms=8, mew=1, zorder=4)
                has_published = True
        for name, score in analysis.baselines(task).items():
            axis.axvline(100 * score, **styles[name])
        axis.set_xlabel("test score, %")
    _legend_of_marks(figure, styles, has_published)
    caption = ("Mean over seeds and its interval." + (" Dashed and dotted: baselines." if names else "")
               + (" Diamond: the number that the paper prints." if has_published else ""))
    return caption, figure


def _legend_of_marks(figure, styles: Mapping[str, dict], has_published: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name.replace("_", " "), **style) for name, style in styles.items()]
    if has_published:
        handles.append(Line2D([], [], marker="D", ls="", mfc="none", mec=INK, ms=7, label="published"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), labelcolor=INK)


def _differences(analysis: Analysis, family: str) -> Drawn:
    tasks = [task for task in analysis.tasks(family) if analysis.comparisons[task]]
    if not tasks or analysis.reference is None and len(analysis.results.models) > ALL_PAIRS:
        return None
    pairs = {f"{a} − {b}": (a, b) for a, b in _pairs(analysis, tasks)}
    figure, parts = _panels(analysis, tasks, 1.15 + ROW * len(pairs), list(pairs))
    for task, axis in parts:
        summaries = {row: [analysis.summary(task, model) for model in pair] for row, pair in pairs.items()}
        found = {row: one.difference for row, both in summaries.items() if all(both) and (one := compare(*both))}
        axis.axvline(0, color=INK, lw=1)
        dots(axis, list(pairs), {row: one.percent for row, one in found.items()},
             lambda row, found=found: COLOURS[0] if found[row].excludes_zero else MUTED)
        axis.set_xlabel("difference, points")
    return "Mean of the differences seed by seed and its interval; grey where the interval reaches zero.", figure


def _pairs(analysis: Analysis, tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Pairs of models, each the same way round in all panels: the one that is better in sum first."""
    sums: dict[tuple[str, str], float] = {}
    for one in (one for task in tasks for one in analysis.comparisons[task]):
        a, b = (one.a, one.b) if (one.b, one.a) not in sums else (one.b, one.a)
        sums[a, b] = sums.get((a, b), 0.0) + (one.difference.mean if a == one.a else -one.difference.mean)
    return [pair if total >= 0 or analysis.reference is not None else pair[::-1] for pair, total in sums.items()]


def _checkpoints(analysis: Analysis, family: str) -> Drawn:
    def label_steps(axis) -> None:
        axis.set_xlabel("pretraining steps")
        axis.xaxis.set_major_formatter(lambda step, _: short_steps(round(step)))

    return _curves(analysis, family, analysis.curves, 2, label_steps,
                   "Test score of checkpoints of one run, or of one recipe at growing budgets.")


def _shares(analysis: Analysis, family: str) -> Drawn:
    def label_shares(axis) -> None:
        axis.set_xlabel("CLM share of the steps, %")
        axis.set_xticks((0, 25, 50, 75, 100))

    return _curves(analysis, family, analysis.shares, 3, label_shares,
                   "From MLM alone (0 %) to CLM alone (100 %) on one budget.")


def _ratios(analysis: Analysis, family: str) -> Drawn:
    return _curves(analysis, family, analysis.ratios, 2, lambda axis: axis.set_xlabel("masked tokens, %"),
                   "Models that mask from the first step on.")


def _curves(analysis: Analysis, family: str, curves: Curves, least: int, label_axis: Callable, caption: str) -> Drawn:
    """A panel for each task on which some curve has at least `least` models."""
    tasks = [task for task in analysis.tasks(family)
             if any(sum(analysis.summary(task, model) is not None for _, model in points) >= least
                    for points in curves.values())]
    if not tasks:
        return None
    figure, parts = _panels(analysis, tasks, 3.0)
    for task, axis in parts:
        for number, (label, points) in enumerate(curves.items()):
            values = [(place, *score.percent) for place, model in points if (score := analysis.score(task, model))]
            if len(values) > 1:
                line(axis, values, colour(number), label)
        axis.set_ylabel("test score, %")
        label_axis(axis)
    legend_below(figure)
    return caption, figure


def _rates(analysis: Analysis, family: str) -> Drawn:
    tasks = [task for task in analysis.tasks(family) if any(one.sensitivity for one in analysis.cells([task]))]
    models = analysis.results.models
    if not tasks:
        return None
    if len(models) > LINES:
        figure, parts = _panels(analysis, tasks, 1.3 + 0.22 * len(models), models)
        images = [_rate_map(axis, analysis, task) for task, axis in parts]
        figure.colorbar(images[-1], ax=figure.axes, label="points below the model's best rate", extend="max")
        caption = ", in points below the model's best."
    else:
        figure, parts = _panels(analysis, tasks, 3.0)
        for task, axis in parts:
            _rate_lines(axis, analysis, task)
        legend_below(figure)
        has_failed = any(summary.cell.failures for summary in analysis.cells(tasks))
        caption = ", with its interval." + (" A cross at the bottom: a run that failed there." if has_failed else "")
    return f"Mean test score over seeds at each learning rate{caption}", figure


def _rate_lines(axis, analysis: Analysis, task: Task) -> None:
    summaries = [summary for summary in analysis.cells([task]) if summary.sensitivity]
    for summary in summaries:
        hue = colour(analysis.results.models.index(summary.model))
        by_rate = sorted(summary.sensitivity.by_rate.items())
        line(axis, [(rate, *score.percent) for rate, score in by_rate], hue, summary.model)
        failed = sorted({run.rate for run in summary.cell.failures})
        axis.plot(failed, [0.02] * len(failed), "x", color=hue, ms=7, mew=2, transform=axis.get_xaxis_transform())
    ticks = sorted({rate for summary in summaries for rate in summary.cell.rates})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [rate_text(rate) for rate in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("test score, %")


def _rate_map(axis, analysis: Analysis, task: Task):
    """A row a model, a column a rate; the colour is how far below the model's best rate it is."""
    by_model = {one.model: one.sensitivity.by_rate for one in analysis.cells([task]) if one.sensitivity}
    rates = sorted({rate for by_rate in by_model.values() for rate in by_rate})
    models = analysis.results.models
    drops = []  # at each rate: points below the best one, NaN where nothing finished
    for by_rate in (by_model.get(model, {}) for model in models):
        best = max((score.mean for score in by_rate.values()), default=math.nan)
        drops.append([100 * (best - by_rate[rate].mean) if rate in by_rate else math.nan for rate in rates])
    image = axis.imshow(drops, cmap="YlGnBu", vmin=0, vmax=MAP_END, aspect="auto")
    axis.set_xticks(range(len(rates)), [rate_text(rate) for rate in rates])
    axis.set_yticks(range(len(models)), models)
    axis.grid(visible=False)
    axis.set_xlabel("learning rate")
    return image
