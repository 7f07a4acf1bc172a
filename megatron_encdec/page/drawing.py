"""How figures are drawn: style, colours, panels, dots with intervals, lines with bands, long curves; a figure -> bytes.

No display is needed, and nothing holds a date: the same numbers give the same bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Told apart by people with any colour vision (after Okabe and Ito), dark enough for thin lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4FA2", "#7F7F7F")
PANEL_WIDTH = 3.1  # inches
CURVE_WIDTH = 5.5  # inches, of a figure that is still legible on a telephone; two stand side by side on a screen
LEAST = 0.66  # of a figure's width, the least on a page: a CURVE_WIDTH fits a telephone
BUCKETS = 300  # of a long curve: more points than that nobody sees
SMOOTHED_OVER = 40  # parts of a curve: its running mean is over one of them
CHARACTER = 0.075  # inches, of a row's name
LEGEND_ROWS, LEGEND_ROW = 3, 0.21  # of a legend: rows that a figure has room for; inches of each further one
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

    @property
    def pixels(self) -> int:
        """Its width on a page."""
        return round(96 * self.figure.get_figwidth())

    @property
    def least_pixels(self) -> int:
        """How narrow a page may make it: narrower its text is not legible, and it is scrolled instead."""
        return round(LEAST * self.pixels)

    def png(self) -> bytes:
        """At 200 dots an inch."""
        return self._bytes(format="png", dpi=200, metadata={"Software": None})

    def svg(self) -> bytes:
        """As vectors."""
        return self._bytes(format="svg", metadata={"Date": None, "Creator": None})

    def _bytes(self, **how) -> bytes:
        import matplotlib

        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, **how)
        return buffer.getvalue()


def panels(titles: Sequence[str], height: float, rows: Sequence[str] = ()):
    """A figure and its panels, one a title, four in a row, each `height` inches high. rows: names down the left side,
    where all panels of a row share them."""
    from matplotlib.figure import Figure

    across = min(len(titles), 4)
    down = -(-len(titles) // across)
    margin = CHARACTER * max(map(len, rows), default=0)
    figure = Figure(figsize=(max(PANEL_WIDTH * across + margin, 5.6), height * down), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    axes = list(figure.subplots(down, across, squeeze=False, sharey="row" if rows else False).flat)
    for unused in axes[len(titles):]:
        unused.remove()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    return figure, axes[: len(titles)]


def colour(position: int) -> str:
    """Of the thing at this place of a list."""
    return COLOURS[position % len(COLOURS)]


def dots(axis, rows: Sequence[str], values: Mapping[str, tuple[float, float]], colour_of: Callable[[str], str]) -> None:
    """A row each from top to bottom: a dot at the mean and a bar of the half width on each side of it."""
    for place, row in enumerate(rows):
        if row in values:
            mean, half = values[row]
            axis.errorbar(mean, place, xerr=half, fmt="o", ms=5.5, color=colour_of(row), elinewidth=2, capsize=3,
                          capthick=1.5, zorder=5)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.08)


def line(axis, points: Sequence[tuple[float, float, float]], hue: str, label: str) -> None:
    """A line through the means of (x, mean, half width), with a band over the half widths."""
    places = [place for place, _, _ in points]
    axis.plot(places, [mean for _, mean, _ in points], "o-", color=hue, ms=4.5, lw=1.8, label=label)
    axis.fill_between(places, [mean - half for _, mean, half in points], [mean + half for _, mean, half in points],
                      color=hue, alpha=0.15, lw=0)


def curve_panel(height: float):
    """A figure of CURVE_WIDTH and its one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(CURVE_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def curve(axis, x_P: np.ndarray, y_P: np.ndarray, hue: str, label: str, dashes: Any = "-",
          is_noisy: bool = True) -> None:
    """A curve. A noisy one: every point, faint (of a long one the least and the greatest of each of BUCKETS), and its
    running mean. x_P: ascending. A curve of few points is drawn as it is."""
    x_P, width = np.asarray(x_P), len(y_P) // SMOOTHED_OVER
    if width < 2 or not is_noisy:
        axis.plot(*extremes(x_P, y_P), ls=dashes, color=hue, lw=1.6, marker="." if width == 0 else "", label=label)
        return
    axis.plot(*extremes(x_P, y_P), color=hue, lw=0.7, alpha=0.3)
    places = np.unique(np.linspace(0, len(x_P) - 1, 2 * BUCKETS).astype(int))
    axis.plot(x_P[places], running_mean(y_P, width)[places], ls=dashes, color=hue, lw=1.8, label=label)


def extremes(x_P: np.ndarray, y_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points themselves, or of more than 2 * BUCKETS the least and the greatest of each bucket, in their order."""
    if len(x_P) <= 2 * BUCKETS:
        return x_P, y_P
    edges = np.linspace(0, len(x_P), BUCKETS + 1).astype(int)
    kept = sorted({place for begin, end in zip(edges, edges[1:], strict=False)
                   for place in (begin + int(y_P[begin:end].argmin()), begin + int(y_P[begin:end].argmax()))})
    return x_P[kept], y_P[kept]


def running_mean(y_P: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` points before each one, of those after it, and of itself; at the ends of fewer."""
    sums = np.concatenate([[0.0], np.cumsum(y_P)])
    begin_P = np.maximum(np.arange(len(y_P)) - width, 0)
    end_P = np.minimum(np.arange(len(y_P)) + width + 1, len(y_P))
    return (sums[end_P] - sums[begin_P]) / (end_P - begin_P)


def legend_below(figure) -> None:
    """One legend for all panels, under them; a figure grows with a long one."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    longest = max(map(len, handles), default=1)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.45 + 0.085 * longest))))
    more = -(-len(handles) // columns) - LEGEND_ROWS
    if more > 0:  # else it would take all of the panels' height, and lie over them
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * more)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, labelcolor=INK)
