"""A fork is its parent going on in another directory: same bits, same counters, a history of its own from there."""

import json
import shlex

import pytest
from small_run import final_bits, metrics, run_cli

from megatron_encdec.cli import main


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_switching_in_process_after_exit_and_in_a_fork_gives_the_same_bits(here, unbroken, begun):
    stopped = begun("stopped")
    fork = here("fork", "--fork", f"{stopped}@6").run
    restarted = here("stopped").run
    for run in (fork, restarted):
        assert metrics(run)[-6:] == metrics(unbroken)[-6:]
        assert final_bits(run, 12) == final_bits(unbroken, 12)

    first = lines_of(fork)[0]
    assert (first["kind"], first["step"]) == ("resume", 6)
    assert first["parent"] == {"path": str(stopped), "step": 6, "state": "all", "history_hash": json.loads(
        (stopped / "checkpoints/step_00000006/run_state.json").read_text())["history_hash"]}
    assert [line["step"] for line in metrics(fork)] == list(range(7, 13))
    assert metrics(fork)[0]["samples"] == 7 * 8 and metrics(fork)[0]["tokens"] == 7 * 8 * 64


def test_many_branches_and_a_branch_of_a_branch(here, begun):
    trunk = begun("trunk")
    low = here("low", "--fork", trunk, "phases.1.objective=mlm:0.1").run  # no step: the newest, written down
    assert f"path: {trunk}\n    step: 6\n" in (low / "config.yaml").read_text()
    high = here("high", "--fork", trunk, "phases.1.objective=mlm:0.5", "--until", "9").run
    assert metrics(low)[0]["targets"] < metrics(high)[0]["targets"]
    again = here("again", "--fork", f"{high}@9", "phases.1.objective=mlm:0.5",
                 "phases=[{name: a, objective: clm, steps: 6}, {name: b, objective: 'mlm:0.5', steps: 3},"
                 " {name: c, objective: clm, steps: 3}]").run
    assert [line["objective"] for line in metrics(again)] == ["clm"] * 3
    assert main(["pretrain", str(again / "config.yaml")]) == 0  # the resolved config is an input here too
    here("trunk", "checkpoint.keep=9")  # goes on: `--fork trunk` without a step still means what it meant
    assert "continuing at step 9" in here("high", "--fork", trunk, "phases.1.objective=mlm:0.5").out


def test_a_fork_killed_before_its_first_checkpoint_begins_again(here, begun):
    trunk = begun("trunk")
    fork = here("fork", "--fork", f"{trunk}@6", "--until", "9").run
    whole = metrics(fork)
    for entry in (fork / "checkpoints").iterdir():
        entry.rename(entry.with_name(f".{entry.name}.tmp"))  # as if nothing had been saved
    lines = (fork / "metrics.jsonl").read_text().splitlines(keepends=True)
    (fork / "metrics.jsonl").write_text("".join(line for line in lines if '"kind": "checkpoint"' not in line))
    assert metrics(here("fork", "--fork", f"{trunk}@6", "--until", "9").run) == whole


def test_another_past_is_refused_with_what_differs(here, begun):
    trunk = begun("trunk")
    error = here("fork", "--fork", f"{trunk}@6", "data.seed=5", "optimizer.lr=1e-3", "phases.0.objective=mlm:0.2",
                 code=2).err.splitlines()
    assert "step_00000006: the config changes what determined this state (recorded -> asked for):" in error[0]
    assert "  data.seed: 1234 -> 5" in error
    assert "  optimizer.lr: 0.005 -> 0.001" in error
    assert "  phases.0.objective.name: 'clm' -> 'mlm'" in error
    assert not any("learning_rates" in line for line in error)
    assert "state=weights" in error[-1] and "Steps 1..6" in error[-1]
    error = here("none", "--fork", f"{trunk}@5", code=2).err
    assert "no checkpoint of step 5; there are step_00000006" in error and error.count("\n") == 1


def test_a_step_that_is_deleted_already_is_told_with_the_way_to_have_it_again(here, begun, tmp_path):
    run = here("kept", "checkpoint={every: 2, keep: 1}").run
    error = here("none", "--fork", f"{run}@8", code=2).err
    assert "no checkpoint of step 8; there are step_00000006, step_00000012. It was saved, and deleted" in error
    assert "checkpoint.keep=1" in error and "checkpoint.steps" in error and error.count("\n") == 1
    words = shlex.split(error.partition("megatron-encdec pretrain ")[2].replace("OTHER", str(tmp_path / "again")))
    assert words[-4:] == ["--fork", f"{run}@6", "--until", "8"]
    run_cli("pretrain", *words)
    whole = here("whole", "checkpoint={every: 2, keep: 9}").run
    assert final_bits(tmp_path / "again", 8) == final_bits(whole, 8)


def test_weights_alone_begin_a_new_history(here, begun):
    parent = begun("parent")
    own = ("data.seed=7", "phases=[{name: only, objective: mlm, steps: 4}]", f"run.from.path={parent}",
           "run.from.step=6", "run.from.state=weights", "schedule.decay_steps=0")
    child = here("child", *own, "checkpoint.every=2", "--until", "2").run
    first, *_ = metrics(child)
    assert (first["step"], first["samples"], first["lr"]) == (1, 8, 2.5e-3)
    scratch = here("scratch", *own[:2], "schedule.decay_steps=0").run
    assert first["loss"] < metrics(scratch)[0]["loss"] - 0.5  # it knows something already
    state = json.loads((child / "checkpoints/step_00000002/run_state.json").read_text())
    parents = json.loads((parent / "checkpoints/step_00000006/run_state.json").read_text())
    assert state["history"]["weights"] == {"step": 6, "history_hash": parents["history_hash"]}
    assert "run_seed" not in state["history"] and state["step"] == 2

    resumed = here("child", *own, "checkpoint.every=2").run
    whole = here("unbroken", *own).run
    assert metrics(resumed) == metrics(whole) and final_bits(resumed, 4) == final_bits(whole, 4)
    assert "weights: " in here("child", *own[:2], "schedule.decay_steps=0", code=2).err  # its origin is its past
    parent.rename(parent.with_name("moved"))
    assert "nothing is left" in here("child", *own, "checkpoint.every=2").out  # remembers it without the parent


def test_weights_cross_precisions(here):
    parent = here("parent", "precision.dtype=bf16", "--until", "6").run
    only = ("phases=[{name: only, objective: clm, steps: 1}]", "schedule={name: constant}", "run.from.state=weights",
            f"run.from.path={parent}", "run.from.step=6")
    full, half = (metrics(here(dtype, f"precision.dtype={dtype}", *only).run)[0]["loss"]
                  for dtype in ("fp32", "bf16"))
    assert full == pytest.approx(half, rel=1e-2) and full != half and full < 5


def test_weights_of_a_phase_have_its_rotary_embedding(here):
    """Also one that the phase gave up: the model's scaling is not that of its weights."""
    scaled = "model.rope_scaling={rope_type: linear, factor: 2}"
    run = here("parent", scaled, "phases=[{name: a, objective: clm, steps: 1}, {name: b, objective: clm, steps: 1, "
               "rope_scaling: false, rope_theta: 500}]", "schedule={name: constant}").run
    child = (f"run.from.path={run}", "run.from.step=2", "run.from.state=weights", "schedule={name: constant}",
             "phases=[{name: only, objective: clm, steps: 1}]", "model.rope_theta=500")
    error = here("child", *child, scaled, code=2).err
    assert "model.rope_scaling: 'absent' -> {" in error and "rope_theta" not in error
    here("child", *child)


def test_weights_of_another_trunk_are_refused(here, half):
    error = here("child", f"run.from.path={half}", "run.from.state=weights", "model.num_layers=1", code=2).err
    assert "  model.num_layers: 2 -> 1" in error.splitlines()


def test_inspecting_a_fork(here, begun, unbroken, capsys):
    trunk = begun("trunk")
    fork = here("fork", "--fork", f"{trunk}@6").run
    middle = here("middle", "--fork", f"{trunk}@6", "--until", "8").run
    inner = here("inner", "--fork", f"{middle}@8").run

    def phases(run):
        capsys.readouterr()
        assert main(["inspect", "run", str(run), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    whole = phases(unbroken)
    for run, begun_at in ((fork, 6), (inner, 8)):
        report = phases(run)
        assert report["begun_at"] == begun_at and report["parent"]["step"] == begun_at
        masked, expected = report["phases"][1], whole["phases"][1]
        for key in ("steps", "planned_steps", "tokens", "targets", "last_loss", "validation"):
            assert masked[key] == expected[key], key
        assert report["targets"] == whole["targets"] and report["tokens"] == whole["tokens"]
        causal = report["phases"][0]
        assert causal["last_loss"] == whole["phases"][0]["last_loss"]  # read from the parent's file
    assert main(["inspect", "run", str(unbroken), str(fork)]) == 0
    assert "CANNOT" not in capsys.readouterr().out
    assert main(["inspect", "run", str(inner)]) == 0
    assert f"{middle}@8" in capsys.readouterr().out

    trunk.rename(trunk.with_name("moved"))
    causal, masked = phases(fork)["phases"]
    assert (causal["steps"], causal["targets"], causal["last_loss"]) == (6, None, None)
    assert masked["targets"] == whole["phases"][1]["targets"]
