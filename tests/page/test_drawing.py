"""Drawing: what a figure has room for."""

import pytest

pytest.importorskip("matplotlib")

from megatron_encdec.page.drawing import STYLE, colour, legend_below, line, panels  # noqa: E402
from megatron_encdec.platform.optional import require  # noqa: E402


@pytest.mark.parametrize("count", [2, 12, 40])
def test_a_long_legend_leaves_the_panels_their_height(count):
    """Thirty models' names once lay over the curves."""
    with require("matplotlib", "a test").rc_context(STYLE):
        figure, (axis,) = panels(["library"], 3.0)
        for number in range(count):
            line(axis, [(0, 50, 1), (1, 60, 1)], colour(number), f"clm-1200-mlm40-1600-s{number}")
        legend_below(figure)
        figure.draw_without_rendering()
    (legend,) = figure.legends
    box, panel = legend.get_window_extent(), axis.get_window_extent()
    assert box.y1 < panel.y0 and panel.height > 0.5 * 3.0 * figure.dpi
