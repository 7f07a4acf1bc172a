"""`doctor CONFIG`: what a config would use here, and what is missing for it."""

import json
import shutil

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
    assert rows["export"] == "clm: LlamaForCausalLM; mlm: EuroBertForMaskedLM"
    out = doctor(workspace / "config.yaml", f"run.dir={tmp_path}/new", "model.norm_place=both")[1]
    assert "clm: not possible, no causal class of transformers holds this trunk (LlamaForCausalLM, Mistral" in out
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
                 *(f"data.{which}.path: {path} is missing; write it: "
                   f"megatron-encdec preprocess --input TEXTS --tokenizer nowhere/t --output nowhere/d --validation-per"
                   for which, path in (("train.0", "nowhere/d"), ("validation.0", "nowhere/d.validation")))):
        assert any(problem.startswith(said) for problem in report["problems"]), (said, report["problems"])
    assert [words for what, words in report["rows"] if what == "tracker"][0].startswith("trackio: ")


def test_a_model_that_is_too_large(doctor, real_run, workspace):
    code, out, _ = doctor(workspace / "config.yaml", "model.hidden_size=65536", "model.ffn_hidden_size=262144",
                          "model.num_layers=64", "run.dir=elsewhere")
    assert code == 1 and "memory: weights, gradients and optimizer alone take" in out
    assert "raise parallel.tensor or parallel.pipeline" in out and "disk: 3 checkpoints" in out


@pytest.mark.parametrize("overrides", [
    ["optimizer.lr=0.5", "phases.0.objective=mlm:0.3"],  # another history
    ["phases.0.steps=2"],  # the run is further than that
    ["data.sequence_length=100000"],  # less than one window
    ["run.dir={tmp}/new", "model.num_layers=3", "run.from.path={run}", "run.from.state=weights"],  # another shape
    ["run.dir={workspace}/config.yaml"],
    ["run.dir={workspace}/config.yaml/below"]])
def test_what_pretrain_refuses_at_its_start_doctor_says_in_the_same_words(overrides, doctor, real_run, workspace,
                                                                          tmp_path, capsys):
    config = str(workspace / "config.yaml")
    overrides = [one.format(tmp=tmp_path, run=real_run, workspace=workspace) for one in overrides]
    code, out, _ = doctor(config, *overrides, "--json")
    assert code == 1
    capsys.readouterr()
    assert main(["pretrain", config, *overrides]) == 2
    assert json.loads(out)["problems"] == [capsys.readouterr().err.removeprefix("megatron-encdec: ").strip()]


def test_the_way_out_of_a_config_that_ends_too_early(doctor, real_run, workspace):
    config = workspace / "config.yaml"
    said = doctor(config, "phases.0.steps=2")[1]
    assert "the config ends at 6; make it longer (phases.N.steps or .tokens; run.total, where phases are" in said
    said = doctor(config, "run.total.steps=800")[2]
    assert "do not add up to the run's total of 800 steps; change phases.N.steps, or leave run.total out" in said


def test_a_checkpoint_that_is_not_whole(doctor, real_run, workspace, tmp_path):
    run = shutil.copytree(real_run, tmp_path / "run", symlinks=True)
    gone = next((run / "checkpoints/step_00000008").glob("*.distcp"))
    gone.unlink()
    code, out, _ = doctor(workspace / "config.yaml", f"run.dir={run}")
    assert code == 1 and f"{gone}: missing; the newest intact checkpoint is step_00000006: use it with --fall" in out
    code, out, _ = doctor(workspace / "config.yaml", f"run.dir={tmp_path}/b", f"run.from.path={run}")
    assert code == 1 and f"{gone}: missing; " in out


def test_a_run_directory_that_is_a_file_is_called_one(doctor, real_run, workspace):
    path = workspace / "config.yaml"
    assert f"{path}: is a file, or lies in one, and no run directory; name another" in doctor(
        path, f"run.dir={path}")[1]


def test_no_rank_at_all(doctor, real_run, workspace):
    code, _, err = doctor(workspace / "config.yaml", "--nproc", 0)
    assert code == 2 and err == "megatron-encdec: --nproc 0: at least one rank\n"


def test_one_thing_at_a_time(doctor, workspace):
    code, _, err = doctor(workspace / "config.yaml", "--nodes")
    assert code == 2 and "--nodes compares machines" in err
