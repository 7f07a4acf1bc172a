"""Numbers that are not finite, made for real by weights that are too large, reach no weight and no checkpoint."""

import json
import math
import re
import shutil

import pytest
import torch
from small_run import PATIENCE, metrics, run_cli, start_code
from trunk_states import fill, make, wrong

from megatron_encdec.data.samples import Samples
from megatron_encdec.engine.boxes import wanted
from megatron_encdec.engine.optimizer import gradient_norm, update_count
from megatron_encdec.interop.source import one_rank
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.rundir.failure import read_failure
from megatron_encdec.text.tokenizer import load_tokenizer
from megatron_encdec.training import origin
from megatron_encdec.training.config import load_config
from megatron_encdec.training.plan import make_plan
from megatron_encdec.training.state import start
from megatron_encdec.training.step import regrouped, share_of_batch

EXPLODING = ("phases.1.lr=1e30", "phases.1.schedule={name: constant, warmup_steps: 6}", "schedule.decay_steps=0")


@pytest.fixture(scope="module")
def rare(root, tmp_path_factory):
    """Overrides for data in which one token, `~`, is rare; its id."""
    directory = tmp_path_factory.mktemp("rare")
    lines = (root / "corpus.jsonl").read_text().splitlines()
    for number in range(5, len(lines), 5):
        text = json.loads(lines[number])["text"]
        lines[number] = json.dumps({"text": text + " ~"})
    (directory / "corpus.jsonl").write_text("\n".join(lines))
    run_cli("preprocess", "--input", directory / "corpus.jsonl", "--tokenizer", root / "tokenizer",
            "--output", directory / "text", "--workers", "1")
    token = load_tokenizer(str(root / "tokenizer")).encode("~")[-1]
    return (f"data.train=[{{path: {directory / 'text'}}}]", "data.validation=[]",
            "phases=[{name: only, objective: clm, steps: 12}]", "checkpoint.every=3"), token


def poison(run, token: int, value: float = math.inf) -> list[int]:
    """Put `value` into the embedding of `token` in the newest checkpoint; the run's samples that hold it."""
    config = load_config(run / "config.yaml")
    with one_rank() as topology:
        plan = make_plan(config)
        begun = start(plan, topology, origin.find(plan))
        for box in wanted(begun.trainer.trunk, begun.trainer.optimizer):
            if box.key.endswith("word_embeddings.weight") and ".exp_avg" not in box.key:
                box.values[token] = value
        begun.saved_step = None
        begun.save(begun.origin.state.metrics_position)
        assert begun.saver.wait()[0].error is None
    samples = Samples(config.data, "train")
    return [index for index in range(12 * 8) if token in samples.sample(index).tokens_S[:-1]]


def test_a_step_that_is_not_wanted_changes_nothing():
    with one_rank() as topology:
        trunk, optimizer = make(topology)
        fill(trunk, optimizer, updates=7)
        for parameter in trunk.parameters():
            parameter.main_grad = torch.full_like(parameter, math.nan, dtype=torch.float32)
        assert math.isnan(gradient_norm(optimizer))
        assert wrong(trunk, optimizer) == [] and update_count(optimizer) == 7


def test_stop_names_step_samples_and_rank_and_saves_nothing(here, root, rare):
    overrides, token = rare
    run = here("run", *overrides, "--until", "3", "batch.micro_size=1").run
    bad = [index for index in poison(run, token) if index >= 24]
    step = bad[0] // 8 + 1
    first = here("run", *overrides, "batch.micro_size=1", code=1)
    assert f"step {step}: loss nan, gradient norm nan" in first.err and first.err.count("\n") == 1
    assert f"on samples {8 * step - 8}..{8 * step - 1}; first seen in samples {bad[0]}..{bad[0]} (rank 0" in first.err
    assert "on_nonfinite=skip" in first.err
    assert metrics(run)[-1]["step"] == step - 1
    assert max(int(entry.name[5:]) for entry in (run / "checkpoints").glob("step_*")) < step

    two = run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *overrides, "batch.micro_size=1", "--nproc", "2",
                  check=False)
    topology = Topology(2, 0, 1, 1, 2, 0, 0, 0)
    owner = 0 if any(bad[0] in share for share in share_of_batch(range(8 * step - 8, 8 * step), 1, topology)) else 1
    assert two.returncode == 1 and "Traceback" not in two.stderr
    assert f"samples {bad[0]}..{bad[0]} (rank {owner}, micro-batch {(bad[0] % 8) // 2})" in two.stderr


def test_a_failure_is_recorded_until_the_run_is_at_work_again(here, rare):
    overrides, token = rare
    run = here("run", *overrides, "--until", "3").run
    step = min(index for index in poison(run, token) if index >= 24) // 8 + 1
    refused = here("run", *overrides, code=1)
    found = read_failure(run)
    assert (found["step"], found["traceback"]) == (step - 1, None)
    assert refused.err == f"megatron-encdec: {found['reason']}\n"
    before = (run / "metrics.jsonl").read_bytes()
    here("run", *overrides, "data.seed=99", code=2)  # refused: this was no launch of the run
    assert read_failure(run) == found and (run / "metrics.jsonl").read_bytes() == before
    here("run", *overrides, "--until", "3")
    assert read_failure(run) is None


def test_a_validation_loss_that_is_no_number_is_null_and_said(here, root, rare):
    (train, _, *more), token = rare
    overrides = (train.replace("data.train", "data.validation"), *more, "evaluation.every=1")
    run = here("run", *overrides, "--until", "3").run
    assert poison(run, token) == []  # it is in the validation data alone
    assert "validation  clm nan" in here("run", *overrides, code=1).out
    lines = metrics(run, "eval")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["losses"]["clm"] < 10 and "nonfinite" not in line for line in lines[:3])
    assert all(line["losses"]["clm"] is None and line["nonfinite"]["clm"] == "nan" for line in lines[3:])
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_regrouped_micro_batch_names_its_own_samples(here, rare):
    overrides, token = rare
    mixture = ("phases=[{name: only, objective: {name: mixture, parts: [{objective: clm}, {objective: mlm}]}, "
               "steps: 12}]", "run.on_nonfinite=skip", "run.max_skipped=12", "--until")
    run = here("run", *overrides, *mixture, "3").run
    poison(run, token)
    here("run", *overrides, *mixture, "12", "checkpoint.every=100", code=1)  # such a weight is not saved in the end
    plan = make_plan(load_config(run / "config.yaml"), world_size=1)
    objective = plan.timeline.stretches[0].objective
    skipped = [line for line in metrics(run) if "nonfinite" in line]
    assert skipped and {1, 2} >= {len(share) for share in (
        one.get("sample_numbers", one["samples"]) for line in skipped for one in line["nonfinite"]["seen"])}
    for line in skipped:
        shares = regrouped(objective, plan.config.data.seed, range(8 * line["step"] - 8, 8 * line["step"]), 2,
                           Topology(1, 0, 1, 1, 1, 0, 0, 0))
        for one in line["nonfinite"]["seen"]:
            share = list(shares[one["micro_batch"]])
            assert one["samples"] == [share[0], share[-1]] and one.get("sample_numbers", share) == share
            assert any(token in plan.train.sample(index).tokens_S for index in share)
    assert any("sample_numbers" in one for line in skipped for one in line["nonfinite"]["seen"])


def test_gradients_alone_that_are_not_finite_name_their_rank_and_parameter(root, here, rare, tmp_path):
    """A weight whose square is infinite is normalised to 0: the loss stays finite, its own gradient does not."""
    overrides, token = rare
    run = here("run", *overrides, "--until", "3").run
    bad = [index for index in poison(run, token, 3e38) if index >= 24]
    step = bad[0] // 8 + 1
    shutil.copytree(run, tmp_path / "two")
    alone = here("run", *overrides, code=1).err
    assert f"step {step}: loss " in alone and "loss nan" not in alone and alone.count("\n") == 1
    assert re.search(r"seen in the gradient of decoder\.layers\.\S+ and \d+ parameters before it \(rank 0\)", alone)

    overrides = (*overrides, "batch.micro_size=1", "--nproc", "2")
    two = run_cli("pretrain", root / "config.yaml", f"run.dir={tmp_path / 'two'}", *overrides, check=False)
    topology = Topology(2, 0, 1, 1, 2, 0, 0, 0)
    first = share_of_batch(range(8 * step - 8, 8 * step), 1, topology)
    owners = {0 if any(index in share for share in first) else 1 for index in bad if index // 8 + 1 == step}
    assert len(owners) == 1, "the fixture should spoil one rank's share alone"
    owner, = owners
    assert two.returncode == 1 and "Traceback" not in two.stderr
    assert re.search(rf"first seen in the gradient of decoder\.layers\.\S+ .*\(rank {owner}\b", two.stderr)
    assert f"(rank {1 - owner}" not in two.stderr


def test_skip_is_logged_counted_limited_and_resumes_exactly(here, rare):
    overrides, token = rare
    runs = {name: here(name, *overrides, "--until", "3").run for name in ("whole", "stopped", "limited")}
    bad = {index // 8 + 1 for run in runs.values() for index in poison(run, token, 3e38) if index >= 24}
    assert 1 < len(bad) < 10, "the fixture should make a few bad steps"
    skip = (*overrides, "run.on_nonfinite=skip")
    whole = here("whole", *skip)
    lines = metrics(runs["whole"])
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {line["step"] for line in lines if "nonfinite" in line} == bad
    for line in lines:
        assert (line["loss"] is None) == (line["grad_norm"] is None) == (line["step"] in bad)
    skipped = next(line for line in lines if line["step"] == max(bad))["nonfinite"]
    # a weight whose square is infinite: normalised to 0, so the loss is finite, but not the gradient
    assert skipped["skipped"] == len(bad) and skipped["grad_norm"] == "nan" and float(skipped["loss"]) < 10
    assert skipped["samples"] == [8 * max(bad) - 8, 8 * max(bad) - 1] and skipped["seen"] == []
    assert f"gradient norm nan, samples {8 * max(bad) - 8}.." in whole.out

    here("stopped", *skip, "--until", str(min(bad)))
    here("stopped", *skip)
    assert metrics(runs["stopped"]) == lines
    last = here("limited", *skip, f"run.max_skipped={len(bad) - 1}", code=1)
    assert f"step {max(bad)}: " in last.err and f"run.max_skipped={len(bad) - 1}" in last.err


def test_an_exploding_run_keeps_the_checkpoint_from_before(here):
    ended = here("run", *EXPLODING, code=1)
    assert "step 8: loss " in ended.err
    assert sorted(entry.name for entry in (ended.run / "checkpoints").iterdir()) == ["latest", "step_00000006"]
    assert metrics(ended.run)[-1]["step"] == 7


SLOW_DISK = """
import os, sys, time
fsync = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.1), fsync(descriptor))[1]
from megatron_encdec.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("disk", ["quick", "slow"])  # slow: a save is still under way when the next two are due
def test_saves_after_a_skipped_step_delete_no_older_checkpoint(disk, here, root, tmp_path):
    command = (*EXPLODING, "run.on_nonfinite=skip", "run.max_skipped=3", "checkpoint.every=2")
    run = tmp_path / "run"
    if disk == "quick":
        error = here("run", *command, code=1).err
    else:
        said = tmp_path / "said"
        ended = start_code(SLOW_DISK, "pretrain", root / "config.yaml", f"run.dir={run}", *command, output=said)
        assert ended.wait(PATIENCE) == 1, said.read_text()
        error = said.read_text()
    names = {entry.name for entry in (run / "checkpoints").glob("step_*")}
    assert {"step_00000006", "step_00000008", "step_00000010"} == names  # keep: 1, and 6 is a boundary
    assert "step 11: " in error and "skipped step number 4" in error


def test_weights_that_an_update_made_infinite_are_not_saved(here):
    ended = here("run", "optimizer.lr=1e39", "checkpoint.every=1", "schedule={name: constant}", code=1)
    assert "step 1: its update made weights nan or infinite: " in ended.err and "(rank 0)" in ended.err
    assert not (ended.run / "checkpoints" / "latest").exists()
