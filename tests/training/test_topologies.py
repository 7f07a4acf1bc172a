"""Loss and gradient norm do not depend on how a run is spread over processes, across the switch of objective.

Micro-batches hold unequal numbers of targets (documents of random length, random masks), so a mean of means, a
wrong gradient scale, or a norm that counts a parameter twice or not at all is seen here.
"""

import pytest
from small_run import metrics, run_cli

STEPS = ("phases.0.steps=10", "phases.1.steps=10", "schedule.warmup_steps=3", "schedule.decay_steps=5")
SEQUENCE = "parallel.sequence=true"
TOPOLOGIES = {
    "tp2": (2, "parallel.tensor=2"),
    "tp2_sequence": (2, "parallel.tensor=2", SEQUENCE),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2": (2,),
    "tp2_pp2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "tp2_pp2_sequence": (4, "parallel.tensor=2", "parallel.pipeline=2", SEQUENCE),
}


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """Train lines of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *STEPS)
    return metrics(run), metrics(run, "eval")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "tp2_pp2" else name
                                  for name in TOPOLOGIES])  # with sequence parallelism it is among the quick ones
def test_agrees_with_one_process(name, alone, pretrain):
    ranks, *overrides = TOPOLOGIES[name]
    run = pretrain(name, "--nproc", str(ranks), *STEPS, *overrides)
    lines, expected = metrics(run), alone[0]
    assert [line["objective"] for line in lines] == ["clm"] * 10 + ["mlm"] * 10
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours["targets"] == theirs["targets"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]
    for ours, theirs in zip(metrics(run, "eval"), alone[1], strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


def test_loss_falls(alone):
    lines = alone[0]
    assert lines[9]["loss"] < lines[0]["loss"] - 0.5
