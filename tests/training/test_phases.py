"""Phases that change all that a phase may change: exact anywhere, on any topology; what does not fit is one line."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from small_run import config_of, final_bits, metrics, run_cli

from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.layout import lay_out

LENGTHS = (6, 5, 4, 5, 4)
ENDS = (6, 11, 15, 20, 24)


@pytest.fixture(scope="module")
def five(root, tmp_path_factory):
    """The five phases that tools/torture.py kills, shorter, and a run of them that nothing stopped."""
    here, tool = tmp_path_factory.mktemp("five"), Path(__file__).parents[2] / "tools" / "torture.py"
    config = yaml.safe_load(runpy.run_path(str(tool))["CONFIG"].format(root=root))
    for phase, steps in zip(config["phases"], LENGTHS, strict=True):
        phase["steps"] = steps
    config["phases"][0]["batch"]["ramp"]["tokens"] = 512
    config |= {"schedule": {"name": "wsd", "warmup_tokens": 1024, "decay_steps": 3},
               "checkpoint": {"every": 100, "keep": 1}, "evaluation": {"every": 7, "batches": 1}}
    (here / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run_cli("pretrain", here / "config.yaml", f"run.dir={here / 'unbroken'}")
    return here


def same(run, five) -> None:
    assert metrics(run) == [line for line in metrics(five / "unbroken") if line["step"] > 24 - len(metrics(run))]
    assert final_bits(run, 24) == final_bits(five / "unbroken", 24)


def test_what_each_step_was(five):
    lines = metrics(five / "unbroken")
    assert [line["phase"] for line in lines if line["step"] in ENDS] == ["causal", "masked", "long", "mixed",
                                                                         "diffusion"]
    assert [line["objective"] for line in lines[18:]] == ["mixture"] * 2 + ["mdlm", "clm"] * 2
    windows = [new["samples"] - old["samples"] for old, new in zip([{"samples": 0}, *lines], lines, strict=False)]
    assert windows == [4, 4, 8, 8, 8, 8] + [8] * 5 + [4] * 4 + [8] * 5 + [8] * 4
    tokens = [new["tokens"] - old["tokens"] for old, new in zip([{"tokens": 0}, *lines], lines, strict=False)]
    assert tokens == [count * (128 if 11 < step <= 20 else 64) for step, count in enumerate(windows, 1)]


@pytest.mark.parametrize("stop", [
    pytest.param(stop, marks=pytest.mark.slow) if stop in (1, 6, 9, 15, 22) else stop
    for stop in (1, 3, 6, 9, 13, 15, 18, 22)])
def test_stopped_anywhere_it_goes_on_with_the_same_bits(five, tmp_path, stop):
    run = tmp_path / "run"
    for until in (stop, 24):
        run_cli("pretrain", five / "config.yaml", f"run.dir={run}", "--until", str(until))
    assert metrics(run) == metrics(five / "unbroken")
    same(run, five)


def test_a_fork_at_a_boundary_has_the_same_bits(five, tmp_path):
    fork = tmp_path / "fork"
    run_cli("pretrain", five / "config.yaml", f"run.dir={fork}", "--fork", f"{five / 'unbroken'}@15")
    same(fork, five)


@pytest.mark.parametrize("ranks, overrides", [
    (2, []), (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    pytest.param(4, ["parallel.tensor=2", "parallel.pipeline=2"], marks=pytest.mark.slow),
    (2, ["parallel.pipeline=2"])])
def test_on_another_topology(five, tmp_path, ranks, overrides):
    """Begun on one process, continued on several inside the second phase."""
    run = tmp_path / "run"
    run_cli("pretrain", five / "config.yaml", f"run.dir={run}", "--until", "9")
    run_cli("pretrain", five / "config.yaml", f"run.dir={run}", "--nproc", str(ranks), *overrides)
    for ours, theirs in zip(metrics(run), metrics(five / "unbroken"), strict=True):
        assert {key: ours[key] for key in ("targets", "samples", "tokens", "lr", "objective")} == {
            key: theirs[key] for key in ("targets", "samples", "tokens", "lr", "objective")}
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]


def test_the_samples_of_every_phase_can_be_looked_at(five):
    shown = run_cli("inspect", "run", five / "config.yaml", "--sample", "0", "90", "110", "140", "--json").stdout
    one, two, three, four = json.loads(shown)["samples"]
    assert [found["phase"] for found in (one, two, three, four)] == ["causal", "long", "mixed", "diffusion"]
    assert [found["tokens"] for found in (one, two, three, four)] == [64, 128, 128, 64]
    assert three["source_key"] == "phases.3.data.train.0" and three["objective"] in ("mlm:0.4", "clm")


def test_the_dry_run_tells_what_each_phase_changes(five):
    said = run_cli("pretrain", five / "config.yaml", "run.dir=nowhere", "--dry-run").stdout
    for line in ("  batch.ramp: 4 -> 8 windows in 2 sizes, the last from step 3 on", "  lr: 0.005 -> 0.003",
                 "  data.sequence_length: 64 -> 128", "  rope_theta: 10000.0 -> 40000.0", "  optimizer_state: reset",
                 "step         4 to 8 windows, 256 to 1,024 tokens"):
        assert line in said.splitlines()


@pytest.mark.parametrize("overrides, says", [
    (["phases.1.batch={ramp: {from: 3, tokens: 999}}"], r"phases.1.batch.ramp.from: 3 windows do not lead up to"),
    (["phases.1.batch={ramp: {from: 2, tokens: 99999}}"], r"phases.1.batch.ramp.tokens: the ramp comes to \d+ steps"),
    (["phases.1.batch={ramp: {from: 2, tokens: 999}}", "batch.micro_size=4"], "phases.1.batch.ramp.from: 2 is no"),
    (["phases.1.batch={global_size: 3}"], "phases.1.batch.global_size: 3 is no multiple"),
    (["phases.1.data={random_length: {min: 8, max: 65}}"], "phases.1.data.random_length.max: 65 is above"),
    (["phases.1.data={random_length: true}"], "phases.1.data.random_length: true says nothing"),
    (["phases.1.data={train: []}"], "phases.1.data.train: empty"),
    (["phases.1.data={seed: 3}"], "phases.1.data.seed: unknown key"),
    (["phases.1.rope_theta=0"], "phases.1.rope_theta: 0.0 is not above 1"),
    (["run.total.tokens=10000", "phases.1.data={sequence_length: 32}"], "their tokens 3,072 . 1,536 = 4,608 do not")])
def test_what_does_not_fit_is_one_line(overrides, says):
    with pytest.raises(UserError, match=says) as error:
        lay_out(config_of(*overrides))
    assert "\n" not in str(error.value)


def test_lengths_in_tokens_and_shares_of_the_run():
    """A phase's tokens come to whole steps of its own size, its ramp included."""
    config = config_of("run.total.tokens=65536", yaml.safe_dump({"phases": None}).strip().replace(": null", "=") +
                       "[{name: a, objective: clm, fraction: 0.25, batch: {ramp: {from: 2, tokens: 6144}}},"
                       " {name: b, objective: mlm, fraction: 0.5, data: {sequence_length: 128}},"
                       " {name: c, objective: mlm, tokens: 16384, batch: {global_size: 4}}]")
    stretches = lay_out(config)
    assert [(one.steps, one.batch_size) for one in stretches] == [(16, 2), (8, 4), (6, 6), (20, 8), (32, 8), (32, 4)]
    assert [one.first_sample for one in stretches] == [0, 32, 64, 100, 260, 516]


def test_the_distance_from_a_phases_first_weights(five, tmp_path):
    """Frozen parts have none; a resume inside a phase, on other ranks too, tells what an unbroken run does."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = ("logging.distance=true", "checkpoint.steps=[18]")
    run_cli("pretrain", five / "config.yaml", f"run.dir={whole}", *asked)
    assert metrics(whole) == metrics(five / "unbroken")
    for until in ("4", "9", "18"):
        run_cli("pretrain", five / "config.yaml", f"run.dir={cut}", *asked, "--until", until)
    said = run_cli("pretrain", five / "config.yaml", f"run.dir={cut}", *asked, "--nproc", "2", "parallel.tensor=2")
    assert "logging.distance" not in said.stdout
    lines, others = metrics(whole, "phase"), metrics(cut, "phase")
    assert [list(line["distance"]) for line in lines] == [["embeddings", "layer 0", "layer 1", "norm", "head"]] * 5
    mixed = lines[3]["distance"]
    assert mixed["embeddings"] == mixed["layer 0"] == 0 < mixed["layer 1"] < 1
    for ours, theirs in zip(others, lines, strict=True):
        assert ours["distance"] == (theirs["distance"] if ours["step"] < 20 else pytest.approx(theirs["distance"],
                                                                                              rel=1e-4))
    assert metrics(whole, "eval")[1]["distance"].keys() == mixed.keys()
    fork = tmp_path / "fork"
    said = run_cli("pretrain", five / "config.yaml", f"run.dir={fork}", *asked, "--fork", f"{cut}@18").stdout
    assert metrics(fork, "phase")[0]["distance"] == pytest.approx(mixed, rel=1e-4)
    (cut / "checkpoints/step_00000015").rename(tmp_path / "away")
    said = run_cli("pretrain", five / "config.yaml", f"run.dir={tmp_path / 'fork2'}", *asked, "--fork", f"{cut}@18",
                   "--until", "20").stdout
    assert "logging.distance: the weights that phase mixed began with (step 15) are not there" in said
    assert "distance" not in metrics(tmp_path / "fork2", "phase")[0]
