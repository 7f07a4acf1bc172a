"""The verb: exit codes and what it prints."""

import pytest

from megatron_encdec.cli import main


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The verb declares itself the only rank, in the environment; undone after each test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return monkeypatch


def test_exports_then_finds_it_done(run_directory, tmp_path, capsys):
    arguments = ["export", f"{run_directory}@6", str(tmp_path / "model")]
    assert main(arguments) == 0
    assert "LlamaForCausalLM, fp32; logits differ" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "already" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_2(tmp_path, capsys):
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint there" in error and error.count("\n") == 1


def test_several_ranks_are_refused(environment, tmp_path, capsys):
    environment.setenv("RANK", "1")
    environment.setenv("WORLD_SIZE", "2")
    assert main(["export", str(tmp_path), str(tmp_path / "model")]) == 2
    assert "one process" in capsys.readouterr().err


def test_inside_a_slurm_allocation_it_is_one_process(environment, run_directory, tmp_path):
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "8")
    assert main(["export", str(run_directory), str(tmp_path / "model"), "--dtype", "bf16"]) == 0
