"""Switches of speed change no number, and neither does stopping under them."""

import json

import pytest
from small_run import final_bits, metrics

from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.checkpoint import read_run_state


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory):
    """Two data-parallel ranks with every switch off."""
    from small_run import run_cli

    run = tmp_path_factory.mktemp("plain") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", "--nproc", "2", "evaluation.every=3")
    return run


OVERLAP = ("performance.overlap_gradients=true", "performance.overlap_parameters=true", "performance.prefetch=2")


def test_overlapped_communication_and_prefetch_give_the_same_bits(plain, pretrain):
    run = pretrain("overlapped", "--nproc", "2", "evaluation.every=3", *OVERLAP)
    assert metrics(run) == metrics(plain)
    assert metrics(run, "eval") == metrics(plain, "eval")  # weights were whole when they were read
    assert final_bits(run, 12) == final_bits(plain, 12)


def test_stopped_and_resumed_under_them(plain, pretrain):
    pretrain("stopped", "--nproc", "2", "evaluation.every=3", *OVERLAP, "--until", "4")
    run = pretrain("stopped", "--nproc", "2", "evaluation.every=3", *OVERLAP)
    assert metrics(run) == metrics(plain)
    assert final_bits(run, 12) == final_bits(plain, 12)


def test_packed_attention_and_small_chunks_stay_within_rounding(plain, pretrain):
    run = pretrain("packed", "--nproc", "2", "performance.attention=packed", "performance.head_chunk=64",
                   "performance.recompute=full", "performance.fuse_activation=true")
    for ours, theirs in zip(metrics(run), metrics(plain), strict=True):
        assert ours["targets"] == theirs["targets"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_speed_is_no_part_of_the_past(here):
    run = here("changed", "--until", "6").run
    ended = here("changed", "performance.prefetch=1", "--until", "7")
    assert metrics(run)[-1]["step"] == 7
    assert "changed: performance.prefetch: None -> 1" in ended.out


def test_precision_may_change_at_a_resume_and_the_history_keeps_both(here, pretrain):
    run = here("mixed", "--until", "4").run
    ended = here("mixed", "precision.dtype=bf16", "--until", "8")
    assert "changed: precision.dtype: 'fp32' -> 'bf16'" in ended.out
    resumed = metrics(run, "resume")[-1]
    assert resumed["changed"]["precision.dtype"] == ["fp32", "bf16"]
    here("mixed", "precision.dtype=bf16", "--until", "10")  # nothing new: the same precision goes on
    here("mixed")  # and back
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))
    history = read_run_state(checkpoint.directory_of(str(run))).history
    assert [(part["start"], part["end"], part["precision"]["dtype"]) for part in history["stretches"]] == [
        (0, 4, "fp32"), (4, 6, "bf16"), (6, 10, "bf16"), (10, 12, "fp32")]
    losses = [line["loss"] for line in metrics(run)]
    assert all(one < losses[0] + 0.2 for one in losses)  # weights came over whole
    assert "nothing is left to do" in here("mixed").out


def test_weights_that_change_dtype_come_from_the_masters(here):
    """bf16 -> fp32: the fp32 weights are the masters' bits, not those of the rounded weights."""
    from megatron_encdec.engine.storage import stored_dtypes

    run = here("wider", "precision.dtype=bf16", "--until", "3").run
    ended = here("wider", "--until", "4")
    assert "changed: precision.dtype: 'bf16' -> 'fp32'" in ended.out
    unbroken = here("narrow", "precision.dtype=bf16", "--until", "4").run
    assert metrics(run)[-1]["loss"] == pytest.approx(metrics(unbroken)[-1]["loss"], rel=5e-3)
    dtypes = stored_dtypes(run / "checkpoints" / "step_00000004")
    assert {str(dtype) for dtype in dtypes.values()} == {"torch.float32"}


def test_a_profile_of_chosen_steps(here, root):
    ended = here("profiled", "--profile", "2..3", "--until", "4")
    folder = ended.run / "profile"
    assert sorted(file.name for file in folder.iterdir()) == ["steps_2-3.rank0.json.gz", "steps_2-3.rank0.txt"]
    import gzip

    trace = json.loads(gzip.decompress((folder / "steps_2-3.rank0.json.gz").read_bytes()))
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    assert "aten::mm" in (folder / "steps_2-3.rank0.txt").read_text()
    assert f"{folder}/steps_2-3.rank0.json.gz" in ended.out
    assert "write a step or a range" in here("refused", "--profile", "3..2", code=2).err


def test_the_log_has_the_speed_of_one_device(plain):
    line = next(json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines())
    assert line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"] / 2)
    assert line["mfu"] > 0
