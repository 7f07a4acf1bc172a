"""The verb: exit codes and what it prints."""

import shutil

import pytest
import torch

from megatron_encdec.cli import main
from megatron_encdec.engine.saver import Saver
from megatron_encdec.interop.source import find, whole_trunk


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Inside Slurm the verb declares itself the only rank, in the environment; undone after each test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return monkeypatch


def test_exports_then_finds_it_done(run_directory, tmp_path, capsys):
    arguments = ["export", f"{run_directory}@6", str(tmp_path / "model")]
    assert main(arguments) == 0
    assert "LlamaForCausalLM, causal attention, fp32; logits differ" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "already" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_2(tmp_path, capsys):
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-encdec: {tmp_path / 'nothing'}: no checkpoint there")
    assert error.count("\n") == 1


def test_several_ranks_are_refused(environment, tmp_path, capsys):
    environment.setenv("RANK", "1")
    environment.setenv("WORLD_SIZE", "2")
    assert main(["export", str(tmp_path), str(tmp_path / "model")]) == 2
    assert "one process" in capsys.readouterr().err


def test_inside_a_slurm_allocation_it_is_one_process(environment, run_directory, tmp_path):
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "8")
    environment.setenv("SLURM_STEP_ID", "0")
    assert main(["export", str(run_directory), str(tmp_path / "model"), "--dtype", "bf16"]) == 0


def test_a_run_that_diverged_leaves_nothing_and_exits_1(run_directory, tmp_path, capsys):
    shutil.copytree(run_directory, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("dtype: bf16", "dtype: fp32"))
    source = find(str(run_directory))
    with whole_trunk(source) as trunk, torch.no_grad():
        trunk.decoder.final_layernorm.weight.fill_(float("nan"))
        saver = Saver(tmp_path / "run" / "checkpoints", trunk, None, keep=1, asynchronous=False)
        saver.save(source.state)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert "NaN" in error and "nothing was written" in error and error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
