#!/usr/bin/env python3
"""Draw the losses of a run through its phases, from its metrics.jsonl: the picture in the README.

    python tools/draw_switch.py work_dirs/demo/run docs/images/switch.svg

Training loss (grey), the validation losses of CLM and MLM, which are both measured all the time, and a line where the
objective changes. Needs matplotlib (pip install 'megatron-encdec[study]').
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_encdec.inspection.loaded import LoadedRun
from megatron_encdec.page.drawing import COLOURS, INK, MUTED, STYLE, Picture, curve
from megatron_encdec.platform.errors import exit_code
from megatron_encdec.platform.optional import require
from megatron_encdec.rundir.files import write_atomic

LABELS = {"clm": "validation, next token (CLM)", "mlm": "validation, masks (MLM)"}


def draw(run: LoadedRun) -> Picture:
    """The picture of `run`."""
    matplotlib = require("matplotlib", "the picture")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for number, phase in enumerate(run.phases):
            lines = [line for line in run.metrics() if line["phase"] == phase["name"] and line["loss"] is not None]
            curve(axes, np.array([line["step"] for line in lines]), np.array([line["loss"] for line in lines]), MUTED,
                  "_later phase" if number else "training, smoothed")
        for number, (name, label) in enumerate(LABELS.items()):
            points = [(line["step"], line["losses"][name]) for line in run.metrics("eval")
                      if line["losses"].get(name) is not None]
            axes.plot(*zip(*points, strict=True), color=COLOURS[number], marker="o", markersize=3.5, label=label)
        for before, after in pairwise(run.phases):
            axes.axvline(after["start"], color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(f" {before['objective']} → {after['objective']}", (after["start"], 1), va="top",
                          xycoords=("data", "axes fraction"))
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a target)")
        axes.legend(loc="upper right")
        axes.set_xlim(0)
    return Picture("switch", "", "losses through the switch", "", figure)


def main(run: str, out: str) -> int:
    picture, path = draw(LoadedRun(run)), Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, picture.png() if path.suffix == ".png" else picture.svg())
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("out", metavar="FILE", help="FILE.svg or FILE.png")
    arguments = parser.parse_args()
    sys.exit(exit_code(main, arguments.run, arguments.out))
