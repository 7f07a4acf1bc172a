"""Stopping and starting again is nothing but time passing: train lines and final weights are the same bits."""

import pytest
from small_run import final_bits, metrics, run_cli


@pytest.fixture(scope="module")
def unbroken(root, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}")
    return run


@pytest.mark.parametrize("stops", [(6,), (3,), (1, 7, 11)], ids=["boundary", "inside", "thrice"])
def test_same_bits_after_stopping(stops, unbroken, pretrain):
    for step in stops:
        run = pretrain("stopped", "--until", str(step))
        assert metrics(run)[-1]["step"] == step
    run = pretrain("stopped")
    assert metrics(run) == metrics(unbroken)
    assert metrics(run, "eval") == metrics(unbroken, "eval")
    assert final_bits(run, 12) == final_bits(unbroken, 12)


def test_bf16_and_two_ranks_resume_exactly(pretrain):
    options = ("precision.dtype=bf16", "--nproc", "2", "parallel.tensor=2")
    whole = pretrain("whole", *options)
    pretrain("stopped", *options, "--until", "6")
    assert metrics(pretrain("stopped", *options)) == metrics(whole)


def test_lines_beyond_the_checkpoint_are_cut_back(unbroken, pretrain):
    run = pretrain("crashed", "--until", "6")
    with open(run / "metrics.jsonl", "a") as file:  # as a crash after step 7 would leave it
        file.write('{"kind": "train", "step": 7, "loss": 0}\n{"kind": "tr')
    assert metrics(pretrain("crashed")) == metrics(unbroken)


def test_another_topology_continues(unbroken, pretrain):
    pretrain("resharded", "--until", "6")
    run = pretrain("resharded", "--nproc", "2", "parallel.pipeline=2")
    for ours, theirs in zip(metrics(run), metrics(unbroken), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_a_finished_run_is_left_alone(unbroken):
    before = final_bits(unbroken, 12)
    result = run_cli("pretrain", unbroken / "config.yaml")  # the resolved config is itself an input
    assert "nothing is left to do" in result.stdout
    assert final_bits(unbroken, 12) == before


def test_a_changed_past_is_refused_and_a_changed_future_is_not(root, pretrain):
    run = pretrain("changed", "--until", "6")
    refused = run_cli("pretrain", root / "config.yaml", f"run.dir={run}", "data.seed=99", check=False)
    assert refused.returncode == 2
    assert "data.seed: 1234 -> 99" in refused.stderr
    pretrain("changed", "phases.1.objective.mask_ratio=0.5", "evaluation.every=3")
    assert metrics(run)[-1]["step"] == 12


def test_reset_forgets_the_moments(unbroken, pretrain):
    run = pretrain("reset", "phases.1.optimizer_state=reset")
    ours, theirs = metrics(run), metrics(unbroken)
    assert ours[:7] == theirs[:7]  # the first step of the phase starts from the same weights
    assert ours[7]["loss"] != theirs[7]["loss"]
    stopped = pretrain("reset_stopped", "phases.1.optimizer_state=reset", "--until", "6")
    pretrain("reset_stopped", "phases.1.optimizer_state=reset")
    assert metrics(stopped) == ours


def test_checkpoints_kept(pretrain):
    run = pretrain("kept", "checkpoint.every=2")
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == [
        "latest", "step_00000006", "step_00000012"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000012\n"
