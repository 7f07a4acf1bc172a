"""How figures are drawn: style, colours, panels, dots with intervals, lines with bands; and a figure -> bytes.

No display is needed, and nothing holds a date: the same results give the same bytes.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_encdec.study.statistics import Interval

# Told apart by people with any colour vision (after Okabe and Ito), dark enough for thin lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4FA2", "#7F7F7F")
PANEL_WIDTH = 3.1  # inches
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
STYLE = {
    "font.size": 9.5, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "axes.axisbelow": True, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.frameon": False, "svg.hashsalt": "megatron-encdec", "svg.fonttype": "path", "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib with the name of its file, the section that it belongs to, a title and a caption."""

    name: str
    section: str
    title: str
    caption: str
    figure: Any


def png(picture: Picture) -> bytes:
    """The picture at 200 dots an inch."""
    return _bytes(picture, format="png", dpi=200, metadata={"Software": None})


def svg(picture: Picture) -> bytes:
    """The picture as vectors."""
    return _bytes(picture, format="svg", metadata={"Date": None, "Creator": None})


def _bytes(picture: Picture, **how) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        picture.figure.savefig(buffer, **how)
    return buffer.getvalue()


def panels(titles: Sequence[str], height: float, share_y: bool = False, margin: float = 0.0):
    """A figure and its panels, one a title, four in a row; `height` of a row and left `margin` in inches."""
    from matplotlib.figure import Figure

    columns = min(len(titles), 4)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(max(PANEL_WIDTH * columns + margin, 5.6), height * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    axes = list(grid.flat)
    for unused in axes[len(titles):]:
        unused.remove()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    return figure, axes[: len(titles)]


def colour(position: int) -> str:
    """Of the model at this place of the list."""
    return COLOURS[position % len(COLOURS)]


def dots(axis, rows: Sequence[str], values: dict[str, Interval | None], colour_of: Callable[[str], str]) -> None:
    """A row each from top to bottom: a dot at the mean, a bar over the interval."""
    for place, row in enumerate(rows):
        value = values.get(row)
        if value is not None:
            axis.errorbar(100 * value.mean, place, xerr=100 * (value.half_width or 0.0), fmt="o", ms=5.5,
                          color=colour_of(row), elinewidth=2, capsize=3, capthick=1.5, zorder=5)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.08)


def line(axis, points: Sequence[tuple[float, Interval]], hue: str, label: str) -> None:
    """A line through means, with a band over intervals."""
    places = [place for place, _ in points]
    means = [100 * value.mean for _, value in points]
    halves = [100 * (value.half_width or 0.0) for _, value in points]
    axis.plot(places, means, "o-", color=hue, ms=4.5, lw=1.8, label=label)
    axis.fill_between(places, [m - h for m, h in zip(means, halves, strict=True)],
                      [m + h for m, h in zip(means, halves, strict=True)], color=hue, alpha=0.15, lw=0)


def legend_below(figure, axes: Sequence) -> None:
    """One legend for all panels, under them."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    longest = max(map(len, handles), default=1)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.45 + 0.085 * longest))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, labelcolor=INK)
