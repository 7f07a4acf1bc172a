"""Loss and gradient norm do not depend on how a run is spread over processes, across the switch of objective.

Micro-batches hold unequal numbers of targets (documents of random length, random masks), so a mean of means, a
wrong gradient scale, or a norm that counts a parameter twice or not at all is seen here.
"""

import pytest
from small_run import metrics

SEQUENCE = "parallel.sequence=true"
TOPOLOGIES = {
    "tp2": (2, "parallel.tensor=2"),
    "tp2_sequence": (2, "parallel.tensor=2", SEQUENCE),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2": (2,),
    "tp2_pp2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "tp2_pp2_sequence": (4, "parallel.tensor=2", "parallel.pipeline=2", SEQUENCE),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "tp2_pp2" else name
                                  for name in TOPOLOGIES])  # with sequence parallelism it is among the quick ones
def test_agrees_with_one_process(name, unbroken, pretrain):
    ranks, *overrides = TOPOLOGIES[name]
    run = pretrain(name, "--nproc", str(ranks), *overrides)
    lines, expected = metrics(run), metrics(unbroken)
    assert [line["objective"] for line in lines] == ["clm"] * 6 + ["mlm"] * 6
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours["targets"] == theirs["targets"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]
    for ours, theirs in zip(metrics(run, "eval"), metrics(unbroken, "eval"), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


PARTS = "parts: [{objective: clm, weight: 1}, {objective: mlm, weight: 1}, {objective: mdlm, weight: 2}]"


@pytest.mark.parametrize("objective", [f"{{name: mixture, {PARTS}}}", "mdlm"], ids=["mixture", "mdlm"])
def test_mixtures_and_weighted_losses_agree_too(objective, pretrain):
    """Batches of 12 that no two kinds of attention fill: the last micro-batches are smaller, or hold filler."""
    phases = f"phases=[{{name: only, objective: {objective}, steps: 6}}]"
    alone, *others = (metrics(pretrain(name, phases, "batch.global_size=12", *arguments)) for name, *arguments in (
        ("alone", "batch.micro_size=6"), ("dp2", "--nproc", "2"),
        ("tp2", "--nproc", "2", "parallel.tensor=2", "batch.micro_size=3"),
        ("pp2", "--nproc", "2", "parallel.pipeline=2", "batch.micro_size=3")))
    for lines in others:
        assert len(lines) == len(alone) == 6
        for ours, theirs in zip(lines, alone, strict=True):
            assert [ours[key] for key in ("targets", "tokens", "samples")] == [
                theirs[key] for key in ("targets", "tokens", "samples")]
            assert ours["objective"] == theirs["objective"] in ("mixture", "mdlm")
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), ours["step"]


def test_loss_falls(unbroken):
    lines = metrics(unbroken)
    assert lines[5]["loss"] < lines[0]["loss"] - 0.5
