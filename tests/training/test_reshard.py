"""Saved on any topology, continued on any other, through the switch: the numbers of the unbroken run."""

from itertools import product

import pytest
from small_run import metrics, run_cli

TOPOLOGIES = {(tensor, pipeline, data) for tensor, pipeline, data in product((1, 2), repeat=3)
              if tensor * pipeline * data <= 4}
CHAIN = [(1, 1, 1), (2, 2, 1), (1, 1, 2), (2, 1, 1), (1, 2, 2), (2, 1, 2), (1, 2, 1), (1, 1, 1)]
assert set(CHAIN) == TOPOLOGIES


def on(topology) -> tuple[str, ...]:
    """Arguments that run on it."""
    tensor, pipeline, data = topology
    return ("--nproc", str(tensor * pipeline * data), f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}")


def name(topology) -> str:
    return "tp{}_pp{}_dp{}".format(*topology)


def agrees(run, unbroken, steps) -> None:
    """The lines of `steps`, within 1e-5."""
    ours = {line["step"]: line for line in metrics(run)}
    theirs = {line["step"]: line for line in metrics(unbroken)}
    assert list(ours) == list(steps)
    for step in steps:
        for key in ("targets", "samples", "objective", "lr"):
            assert ours[step][key] == theirs[step][key], (step, key)
        for key in ("loss", "grad_norm"):
            assert ours[step][key] == pytest.approx(theirs[step][key], rel=1e-5), (step, key)


@pytest.fixture(scope="module")
def unbroken(root, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", "phases.0.steps=8", "phases.1.steps=8")
    return run


def test_one_run_over_all_topologies(root, tmp_path, unbroken):
    """Two steps on each; the switch falls between two of them."""
    for number, topology in enumerate(CHAIN, 1):
        run_cli("pretrain", root / "config.yaml", f"run.dir={tmp_path / 'run'}", "phases.0.steps=8", "phases.1.steps=8",
                "--until", 2 * number, *on(topology))
    agrees(tmp_path / "run", unbroken, range(1, 17))
    changes = [line["changed"] for line in metrics(tmp_path / "run", "resume")]
    assert changes[0]["topology.world_size"] == [1, 4] and changes[0]["parallel.tensor"] == [1, 2]
    assert len(changes) == len(CHAIN) - 1 and all("topology.world_size" in change or "parallel.tensor" in change
                                                  for change in changes)


@pytest.mark.slow
@pytest.mark.parametrize("written", sorted(TOPOLOGIES), ids=name)
def test_every_pair(written, root, tmp_path, unbroken):
    """Saved after step 7 on one topology, forked on each of them, through the switch after step 8."""
    steps = ("phases.0.steps=8", "phases.1.steps=8")
    source = tmp_path / "source"
    run_cli("pretrain", root / "config.yaml", f"run.dir={source}", *steps, "--until", "7", *on(written))
    agrees(source, unbroken, range(1, 8))
    for topology in sorted(TOPOLOGIES):
        run = tmp_path / name(topology)
        run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *steps, "--fork", f"{source}@7", *on(topology))
        agrees(run, unbroken, range(8, 17))
