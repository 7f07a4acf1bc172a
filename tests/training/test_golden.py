"""The losses of one small run, through the switch, as they have been since they were written down.

Any change of order, masks, initial weights, loss, optimizer or schedule moves them; rounding on another processor moves
them by less than the tolerance. To write them down again, after a change that is meant to: run the test with GOLDEN=1.
"""

import json
import os
from pathlib import Path

import pytest
from small_run import metrics

GOLDEN = Path(__file__).with_name("golden_losses.json")


def test_sixty_steps_in_fp32_through_the_switch(here):
    run = here("run", "phases.0.steps=24", "phases.1.steps=36", "schedule.decay_steps=12", "evaluation.every=20").run
    found = {"train": [line["loss"] for line in metrics(run)],
             "validation": [line["losses"] for line in metrics(run, "eval")],
             "targets": metrics(run)[-1]["targets"]}
    if "GOLDEN" in os.environ:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert found["train"] == pytest.approx(golden["train"], rel=1e-4)
    assert found["targets"] == golden["targets"]
    for ours, theirs in zip(found["validation"], golden["validation"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
