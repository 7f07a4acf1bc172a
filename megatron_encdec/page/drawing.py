"""How figures are drawn: style, colours, panels, dots with intervals, lines with bands; and a figure -> bytes.

No display is needed, and nothing holds a date: the same numbers give the same bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Told apart by people with any colour vision (after Okabe and Ito), dark enough for thin lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4FA2", "#7F7F7F")
PANEL_WIDTH = 3.1  # inches
CHARACTER = 0.075  # inches, of a row's name
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


def legend_below(figure) -> None:
    """One legend for all panels, under them."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    longest = max(map(len, handles), default=1)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.45 + 0.085 * longest))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, labelcolor=INK)
