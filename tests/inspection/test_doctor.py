"""`doctor CONFIG`: what a config would use here, and what is missing for it."""

import json

import pytest

from megatron_encdec.cli import main
from megatron_encdec.platform.device import device_type
from megatron_encdec.rundir.lock import FolderLock

pytestmark = pytest.mark.skipif(device_type() == "cuda", reason="the figures are those of a CPU")


@pytest.fixture
def doctor(capsys):
    """doctor(...) -> (exit code, output, error output)."""
    def call(*arguments):
        capsys.readouterr()
        code = main(["doctor", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return call


def test_a_config_that_can_run(doctor, real_run, workspace, tmp_path):
    code, out, err = doctor(workspace / "config.yaml", f"run.dir={tmp_path}/new", "--nproc", 2)
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in out.splitlines() if "  " in line}
    assert (code, err) == (0, "") and out.endswith("config.yaml can run here\n")
    assert rows["ranks"] == "2 = tensor 1 x pipeline 1 x data 2" and rows["layers"] == "torch"
    assert rows["batch"] == "4 windows of 32 tokens = 2 x 1 micro-batches of 2"
    assert rows["data.train.0"].startswith(f"{workspace}/corpus, ") and "GiB a rank" in rows["memory"]
    assert rows["run"] == f"{tmp_path}/new: begins at step 0" and rows["tracker"] == "none"
    assert f"{real_run}: goes on after step 8" in doctor(workspace / "config.yaml")[1]


def test_all_that_is_missing_is_said_at_once(doctor, real_run, workspace, tmp_path):
    with FolderLock(tmp_path):
        code, out, _ = doctor(
            workspace / "config.yaml", f"run.dir={tmp_path}", "--json", "tokenizer.path=nowhere/t",
            "data.train.0.path=nowhere/d", "data.validation=[{path: nowhere/d.validation}]", "--nproc", 3,
            "logging.trackers=[trackio]", "precision.fp8=current", "precision.dtype=bf16")
    report = json.loads(out)
    assert code == 1
    for said in ("batch.global_size: 4 windows cannot be split", "precision.fp8: current is not possible here",
                 "tokenizer.path: nowhere/t is missing; give the path of one", f"run.dir: {tmp_path} is in use by pid",
                 *(f"data.{which}.path: {path} is missing; write it: preprocess --output nowhere/d --validation-perc"
                   for which, path in (("train.0", "nowhere/d"), ("validation.0", "nowhere/d.validation")))):
        assert any(problem.startswith(said) for problem in report["problems"]), (said, report["problems"])
    assert [words for what, words in report["rows"] if what == "tracker"][0].startswith("trackio: ")


def test_a_model_that_is_too_large(doctor, real_run, workspace):
    code, out, _ = doctor(workspace / "config.yaml", "model.hidden_size=65536", "model.ffn_hidden_size=262144",
                          "model.num_layers=64", "run.dir=elsewhere")
    assert code == 1 and "memory: weights, gradients and optimizer alone take" in out
    assert "raise parallel.tensor or parallel.pipeline" in out and "disk: 3 checkpoints" in out


def test_one_thing_at_a_time(doctor, workspace):
    code, _, err = doctor(workspace / "config.yaml", "--nodes")
    assert code == 2 and "--nodes compares machines" in err
