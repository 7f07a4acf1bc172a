"""A study whose jobs are Slurm's: they depend on each other there, and go on without the driver."""

import importlib.util
import json
import sys

import pytest
import yaml
from small_run import final_bits, metrics, steps_done, wait_until

from megatron_encdec.study.config import load_study
from megatron_encdec.study.plan import plan_study

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs submitit: ENCDEC_ENV=nemo bash tests/run.sh -m slurm")]


def test_a_study_goes_on_under_slurm_while_its_driver_is_dead(cluster, root, tmp_path, on_one_host):
    study, head = tmp_path / "study.yaml", cluster.hosts.head
    study.write_text(yaml.safe_dump({
        "base": str(root / "config.yaml"), "output": "out", "models": ["clm-6-mlm30-12", "clm-12"],
        "slurm": {"timeout_min": 10, "gpus_per_node": 0}}))
    command = (sys.executable, "-m", "megatron_encdec", "study", "run", study, "--executor", "slurm")
    plan, stretches = plan_study(load_study(study)), tmp_path / "out" / "stretches"
    driver = head.start(*command, output=tmp_path / "first")
    wait_until(lambda: (tmp_path / "out/jobs/models/clm-12/job.json").exists(), "all jobs are submitted", 60)
    driver.kill()
    head.run("pkill", "-9", "-f", "study run", code=None)
    ends = [stretches / plan.tree.last[name].id / "checkpoints/step_00000012" for name in ("clm-6-mlm30-12", "clm-12")]
    wait_until(lambda: all(end.exists() for end in ends), "the stretches", 120)  # nobody drives
    head.run(*command, timeout=180)
    for branch in plan.branches:
        assert steps_done(stretches / branch.id) == branch.steps  # none was done twice
    lines = [line for branch in plan.tree.path("clm-6-mlm30-12") for line in metrics(stretches / branch.id)]
    assert (lines, final_bits(ends[0].parents[1], 12)) == on_one_host(ranks=1)
    for name in ("clm-6-mlm30-12", "clm-12"):
        assert json.loads((tmp_path / "out/models" / name / "export.json").read_text())["step"] == 12
