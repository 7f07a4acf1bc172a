"""The tree of a study's runs as a figure: a line a stretch, from left to right over steps, coloured by objective.

    1. `tree_picture(plan, states)`         for the page
    2. `write_picture(plan, states, path)`  for `study plan --picture`
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_encdec.page.drawing import INK, MUTED, STYLE, Picture, colour
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require
from megatron_encdec.rundir.files import write_atomic
from megatron_encdec.study.curves import short_steps
from megatron_encdec.study.plan import StudyPlan, drawn
from megatron_encdec.study.tree import Branch

ROW, MARGIN, WIDTH = 0.24, 1.1, 9.5  # inches: a row, above and below all of them, the whole
STATES = {"done": (3.0, "-"), "running": (3.0, "--"), "to do": (1.6, "-")}  # line width, style


def tree_picture(plan: StudyPlan, states: Mapping[str, str]) -> Picture:
    """A row for each model's end; a fork goes down from the trunk that it leaves. Raises `UserError` where matplotlib
    is not installed."""
    with require("matplotlib", "study plan --picture").rc_context(STYLE):
        return Picture("tree", "tree", "The runs of the study",
                       "What models have in common is trained once. Thick: done; dashed: running.",
                       _draw(plan, states))


def write_picture(plan: StudyPlan, states: Mapping[str, str], path: Path) -> None:
    """The figure at `path`, an .svg or .png."""
    kinds = {".svg": Picture.svg, ".png": Picture.png}
    if path.suffix not in kinds:
        raise UserError(f"--picture {path}: name a file that ends in .svg or .png")
    try:
        write_atomic(path, kinds[path.suffix](tree_picture(plan, states)))
    except OSError as error:
        raise UserError(f"--picture {path}: cannot be written ({error.strerror})") from None


def _draw(plan: StudyPlan, states: Mapping[str, str]):
    from matplotlib.figure import Figure

    rows = _rows(plan)
    count = max(rows.values()) + 1
    names = list(dict.fromkeys(one.objective.short_name() for branch in plan.branches for one in branch.stretches))
    figure = Figure(figsize=(WIDTH, MARGIN + ROW * count), layout="constrained")
    axis = figure.subplots()
    for branch in plan.branches:
        _draw_branch(axis, branch, rows, names, states.get(branch.id, "to do"))
    axis.set_ylim(count - 0.4, -0.8)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.3)
    axis.set_xlim(left=0)
    axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= axis.dataLim.xmax])  # names stand right of it
    axis.set_xlabel("steps")
    axis.xaxis.set_major_formatter(lambda step, _: short_steps(round(step)))
    for place, name in enumerate(names):
        axis.plot([], [], color=colour(place), lw=2.5, label=name)
    figure.legend(loc="outside lower center", ncols=min(len(names), 8), labelcolor=INK)
    return figure


def _rows(plan: StudyPlan) -> dict[Branch, int]:
    """Each branch's row: the trunk keeps its parent's, every fork opens one below what was drawn before it."""
    rows, depths, used = {}, {}, 0
    for branch, depth in drawn(plan.tree, trunk_first=True):
        depths[branch] = depth
        goes_on = branch.parent is not None and depths[branch.parent] == depth
        rows[branch] = rows[branch.parent] if goes_on else used
        used += not goes_on
    return rows


def _draw_branch(axis, branch: Branch, rows: Mapping[Branch, int], names: list[str], state: str) -> None:
    row, first = rows[branch], branch.start + branch.before
    width, style = STATES[state]
    if branch.parent is not None and rows[branch.parent] != row:
        axis.plot([first, first], [rows[branch.parent], row], color=MUTED, lw=0.8, zorder=1)
    for one in branch.stretches:
        ends = [max(one.start, branch.start) + branch.before, min(one.end, branch.end) + branch.before]
        axis.plot(ends, [row, row], color=colour(names.index(one.objective.short_name())), lw=width, ls=style,
                  solid_capstyle="butt", zorder=2)
    if branch.ending:
        above = 6 if branch.children else 0  # the row goes on to the right
        axis.annotate(", ".join(branch.ending), (branch.end + branch.before, row), (5, above), va="center", fontsize=8,
                      textcoords="offset points", color=INK)
