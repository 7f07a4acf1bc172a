"""The report's figures: scores with intervals, differences, curves over checkpoints and CLM shares, learning rates.

Each family has a figure of each kind, with a panel for each dataset. A model has one colour throughout.

    1. `all_figures(analysis)`     those that have something to show
"""

from collections.abc import Sequence

from megatron_encdec.platform.optional import require
from megatron_encdec.study import published
from megatron_encdec.study.analysis import Analysis, Task
from megatron_encdec.study.checkpoints import short_steps
from megatron_encdec.study.drawing import COLOURS, INK, MUTED, STYLE, Picture, colour, dots, legend_below, line, panels
from megatron_encdec.study.statistics import Comparison, compare
from megatron_encdec.study.tables import rate_text

FAMILY_NAMES = {"SC": "Sequence classification", "TC": "Token classification", "QA": "Question answering",
                "IR": "Retrieval"}
DASHES = ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
LINES = 12  # models up to which learning rates are drawn as lines; more are a map of colours
MAP_END = 20.0  # points below the best rate at which that map ends


def all_figures(analysis: Analysis) -> list[Picture]:
    """Every figure that has something to show. Raises `UserError` where matplotlib is not installed."""
    matplotlib = require("matplotlib", "study report")
    pictures = []
    with matplotlib.rc_context(STYLE):
        for family in analysis.families:
            for draw in (_scores, _differences, _checkpoints, _shares, _rates):
                if (picture := draw(analysis, family)) is not None:
                    pictures.append(picture)
    return pictures


def _scores(analysis: Analysis, family: str) -> Picture | None:
    tasks, models = analysis.tasks(family), analysis.results.models
    models = [model for model in models if any(analysis.summary(task, model) for task in tasks)]
    names = list(dict.fromkeys(name for task in tasks
                               for name in _baselines(analysis, task)))
    titles = [analysis.label(task) for task in tasks]
    figure, axes = panels(titles, 1.15 + 0.3 * len(models), share_y=True,
                           margin=0.075 * max(map(len, models)))
    has_published = False
    for axis, task in zip(axes, tasks, strict=True):
        scores = {model: summary.score for model in models if (summary := analysis.summary(task, model))}
        dots(axis, models, scores, lambda model: colour(analysis.results.models.index(model)))
        for model in models:
            value = published.CELLS.get((model, published.dataset_name(*task)))
            if value is not None:
                axis.plot(value, models.index(model), "D", mfc="none", mec=INK, ms=8, mew=1, zorder=4)
                has_published = True
        for name, score in _baselines(analysis, task).items():
            axis.axvline(100 * score, color=MUTED, lw=1.3, ls=DASHES[names.index(name) % len(DASHES)])
        axis.set_xlabel("test score, %")
    handles = _legend_of_marks(names, has_published)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), labelcolor=INK)
    return Picture(f"scores_{family}", "scores", f"{FAMILY_NAMES[family]}: test scores",
                   "Mean over seeds and its interval."
                   + (" Dashed and dotted: baselines." if names else "")
                   + (" Diamond: the number that the paper prints." if has_published else ""), figure)


def _baselines(analysis: Analysis, task: Task) -> dict[str, float]:
    found = analysis.results.baselines.get(task[:2])
    return found.scores if found else {}


def _legend_of_marks(names: Sequence[str], has_published: bool) -> list:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=MUTED, lw=1.3, ls=DASHES[place % len(DASHES)], label=name.replace("_", " "))
               for place, name in enumerate(names)]
    if has_published:
        handles.append(Line2D([], [], marker="D", ls="", mfc="none", mec=INK, ms=7, label="published"))
    return handles


def _differences(analysis: Analysis, family: str) -> Picture | None:
    tasks = [task for task in analysis.tasks(family) if analysis.comparisons[task]]
    if not tasks or not analysis.shows_pairs:
        return None
    pairs = _pairs(analysis, tasks)
    values = {task: {f"{a} − {b}": found.difference for a, b in pairs if (found := _compared(analysis, task, a, b))}
              for task in tasks}
    rows = [f"{a} − {b}" for a, b in pairs]
    titles = [analysis.label(task) for task in tasks]
    figure, axes = panels(titles, 1.15 + 0.3 * len(rows), share_y=True, margin=0.075 * max(map(len, rows)))
    for axis, task in zip(axes, tasks, strict=True):
        axis.axvline(0, color=INK, lw=1)
        dots(axis, rows, values[task],
             lambda row, shown=values[task]: COLOURS[0] if shown[row].excludes_zero else MUTED)
        axis.set_xlabel("difference, points")
    return Picture(f"differences_{family}", "comparisons", f"{FAMILY_NAMES[family]}: differences over the same seeds",
                   "Mean of the differences seed by seed and its interval; grey where the interval reaches zero.",
                   figure)


def _pairs(analysis: Analysis, tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Pairs of models, each the same way round in all panels: the one that is better in sum first."""
    sums: dict[tuple[str, str], float] = {}
    for one in (one for task in tasks for one in analysis.comparisons[task]):
        a, b = (one.a, one.b) if (one.b, one.a) not in sums else (one.b, one.a)
        sums[a, b] = sums.get((a, b), 0.0) + (one.difference.mean if a == one.a else -one.difference.mean)
    return [pair if total >= 0 or analysis.reference is not None else pair[::-1] for pair, total in sums.items()]


def _compared(analysis: Analysis, task: Task, a: str, b: str) -> Comparison | None:
    ours, theirs = analysis.summary(task, a), analysis.summary(task, b)
    return compare(ours, theirs) if ours is not None and theirs is not None else None


def _checkpoints(analysis: Analysis, family: str) -> Picture | None:
    tasks = [task for task in analysis.tasks(family)
             if any(sum(analysis.summary(task, model) is not None for _, model in points) > 1
                    for points in analysis.curves.values())]
    if not tasks:
        return None
    titles = [analysis.label(task) for task in tasks]
    figure, axes = panels(titles, 3.0)
    for axis, task in zip(axes, tasks, strict=True):
        for place, (series, points) in enumerate(analysis.curves.items()):
            values = [(step, summary.score) for step, model in points
                      if (summary := analysis.summary(task, model)) is not None and summary.score is not None]
            if len(values) > 1:
                line(axis, values, colour(place), series)
        axis.set_xlabel("pretraining steps")
        axis.set_ylabel("test score, %")
        axis.xaxis.set_major_formatter(lambda step, _: short_steps(round(step)))
    legend_below(figure, axes)
    return Picture(f"checkpoints_{family}", "checkpoints", f"{FAMILY_NAMES[family]}: over checkpoints",
                   "Test score of checkpoints of one run, or of one recipe at growing budgets.", figure)


def _shares(analysis: Analysis, family: str) -> Picture | None:
    tasks = [task for task in analysis.tasks(family)
             if any(sum(analysis.summary(task, model) is not None for _, model in points) > 2
                    for points in analysis.shares.values())]
    if not tasks:
        return None
    titles = [analysis.label(task) for task in tasks]
    figure, axes = panels(titles, 3.0)
    for axis, task in zip(axes, tasks, strict=True):
        for place, ((series, total), points) in enumerate(analysis.shares.items()):
            values = [(100 * share, summary.score) for share, model in points
                      if (summary := analysis.summary(task, model)) is not None and summary.score is not None]
            if len(values) > 1:
                line(axis, values, colour(place), f"{series}, {short_steps(total)} steps")
        axis.set_xlabel("CLM share of the steps, %")
        axis.set_ylabel("test score, %")
        axis.set_xticks((0, 25, 50, 75, 100))
    legend_below(figure, axes)
    return Picture(f"shares_{family}", "checkpoints", f"{FAMILY_NAMES[family]}: over the CLM share",
                   "From MLM alone (0 %) to CLM alone (100 %) on one budget.", figure)


def _rates(analysis: Analysis, family: str) -> Picture | None:
    tasks = [task for task in analysis.tasks(family)
             if any(cell.key in analysis.sensitivities for cell in analysis.results.of_task(task))]
    if not tasks:
        return None
    models = analysis.results.models
    if len(models) > LINES:
        titles = [analysis.label(task) for task in tasks]
        figure, axes = panels(titles, 1.3 + 0.22 * len(models), share_y=True,
                               margin=0.075 * max(map(len, models)))
        _maps(analysis, tasks, figure, axes)
    else:
        titles = [analysis.label(task) for task in tasks]
        figure, axes = panels(titles, 3.0)
        for axis, task in zip(axes, tasks, strict=True):
            _rate_lines(analysis, task, axis)
        legend_below(figure, axes)
    return Picture(f"learning_rates_{family}", "sensitivity", f"{FAMILY_NAMES[family]}: over learning rates",
                   "Mean test score over seeds at each learning rate"
                   + (", in points below the model's best." if len(models) > LINES else
                      ", with its interval." + _cross(analysis, tasks)), figure)


def _cross(analysis: Analysis, tasks: Sequence[Task]) -> str:
    failed = any(cell.failures for task in tasks for cell in analysis.results.of_task(task))
    return " A cross at the bottom: a run that failed there." if failed else ""


def _rate_lines(analysis: Analysis, task: Task, axis) -> None:
    ticks: set[float] = set()
    for cell in analysis.results.of_task(task):
        found = analysis.sensitivities.get(cell.key)
        if found is None:
            continue
        hue = colour(analysis.results.models.index(cell.key.model))
        line(axis, sorted(found.by_rate.items()), hue, cell.key.model)
        ticks |= set(cell.rates)
        failed = sorted({run.rate for run in cell.failures})
        axis.plot(failed, [0.02] * len(failed), "x", color=hue, ms=7, mew=2, transform=axis.get_xaxis_transform())
    axis.set_xscale("log")
    axis.set_xticks(sorted(ticks), [rate_text(rate) for rate in sorted(ticks)])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("test score, %")


def _maps(analysis: Analysis, tasks: Sequence[Task], figure, axes: Sequence) -> None:
    models = analysis.results.models
    for axis, task in zip(axes, tasks, strict=True):
        cells = {cell.key.model: analysis.sensitivities.get(cell.key) for cell in analysis.results.of_task(task)}
        rates = sorted({rate for found in cells.values() if found for rate in found.by_rate})
        drops = [[_drop(cells.get(model), rate) for rate in rates] for model in models]
        image = axis.imshow(drops, cmap="YlGnBu", vmin=0, vmax=MAP_END, aspect="auto")
        axis.set_xticks(range(len(rates)), [rate_text(rate) for rate in rates])
        axis.set_yticks(range(len(models)), models)
        axis.grid(visible=False)
        axis.set_xlabel("learning rate")
    figure.colorbar(image, ax=list(axes), label="points below the model's best rate", extend="max")


def _drop(found, rate: float) -> float:
    if found is None or rate not in found.by_rate:
        return float("nan")
    return 100 * (max(value.mean for value in found.by_rate.values()) - found.by_rate[rate].mean)
