"""examples/kubernetes: Kubernetes takes it, its numbers fit together, its command is one of ours."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "examples" / "kubernetes" / "pretrain.yaml"
PROGRAM = "kubernetes-validate"
VALIDATE = shutil.which(PROGRAM, path=ROOT / ".venv-kubernetes/bin") or shutil.which(PROGRAM)


@pytest.fixture
def job():
    """The specification of the Job."""
    (one,) = [document for document in yaml.safe_load_all(MANIFEST.read_text()) if document["kind"] == "Job"]
    return one["spec"]


@pytest.mark.skipif(VALIDATE is None, reason=f"needs {PROGRAM} (pip install {PROGRAM}; .ci/run does)")
def test_kubernetes_takes_it(tmp_path):
    done = subprocess.run([VALIDATE, "--strict", MANIFEST], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(MANIFEST.read_text().replace("completionMode", "completionMood"))
    assert subprocess.run([VALIDATE, "--strict", wrong], capture_output=True).returncode != 0


def test_its_command_is_one_that_we_take_and_its_numbers_fit(job):
    from megatron_encdec.cli import _parse, parser_of

    (container,) = job["template"]["spec"]["containers"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    arguments = _parse(parser_of(words[0]), words)
    assert (ROOT / arguments.config).exists()
    assert job["completions"] == job["parallelism"] == arguments.nnodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == arguments.nproc
    assert arguments.node_rank == 1 and arguments.master.startswith("pretrain-0.pretrain")


def test_what_ends_it_and_what_counts_as_no_failure(job):
    """A mistake is exit code 2; the code for `stopped` is the one that is asked for."""
    (container,) = job["template"]["spec"]["containers"]
    (stopped,) = [int(word.partition("=")[2]) for word in container["args"] if "--stopped-exit-code" in word]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]
             if "onExitCodes" in rule}
    assert rules == {"FailJob": [2], "Ignore": [stopped]}


def test_it_mounts_where_the_config_looks(job):
    """run.dir, data and tokenizer, relative to the image's working directory."""
    (container,) = job["template"]["spec"]["containers"]
    config = yaml.safe_load((ROOT / container["args"][1]).read_text())
    paths = [config["run"]["dir"], config["tokenizer"]["path"], *(one["path"] for one in config["data"]["train"])]
    mounted = {one["mountPath"] for one in container["volumeMounts"]}
    assert {f"/workspace/{path.partition('/')[0]}" for path in paths} <= mounted
