"""A study whose jobs are Slurm's: they depend on each other there, and go on without the driver."""

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from finetune_sets import losses, write_set
from small_run import PATIENCE, final_bits, metrics, run_cli, steps_done, wait_until
from small_study import NothingTwice, check_against_models_alone, states, write_study
from virtual_cluster import ASK

from megatron_encdec.study.config import load_study
from megatron_encdec.study.plan import plan_study

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs submitit: ENCDEC_ENV=nemo bash tests/run.sh -m slurm")]
SLURM = {"timeout_min": 30, "gpus_per_node": 0}


def start_driver(cluster, study: Path, output: Path) -> subprocess.Popen:
    words = ("-m", "megatron_encdec", "study", "run", study, "--executor", "slurm")
    return cluster.hosts.head.start(sys.executable, *words, output=output)


def kill_driver(cluster, driver: subprocess.Popen) -> None:
    cluster.hosts.head.signal(driver, signal.SIGKILL)
    driver.wait()


def wait_for_a_word(driver: subprocess.Popen, output: Path) -> None:
    wait_until(lambda: output.stat().st_size > 0 or driver.poll() is not None, "a driver at work")


def jobs_in(cluster) -> list[str]:
    """Names of the jobs that Slurm has."""
    return sorted(cluster.hosts.head.run("squeue", "--noheader", "--format=%j").stdout.split())


@pytest.mark.slow
def test_a_study_goes_on_under_slurm_while_its_driver_is_dead(cluster, root, tmp_path, on_one_host):
    """The first driver is killed, and with it what it would have written of its jobs between sbatch and its end: a
    second one finds them by what Slurm says, and submits none twice."""
    study = write_study(root, tmp_path, ["clm-6-mlm30-12", "clm-12"], slurm=SLURM)
    plan, stretches = plan_study(load_study(study)), tmp_path / "out" / "stretches"
    driver = start_driver(cluster, study, tmp_path / "first")
    wait_until(lambda: "models.clm-12" in jobs_in(cluster), "all jobs are submitted", pause=ASK)
    kill_driver(cluster, driver)
    for record in (tmp_path / "out/jobs").rglob("job.json"):
        record.unlink()
    before = jobs_in(cluster)
    second, said = start_driver(cluster, study, tmp_path / "second"), tmp_path / "second"
    wait_until(lambda: said.read_text().count("still runs") == len(before) or "started" in said.read_text(),
               "the second driver has looked")
    kill_driver(cluster, second)
    assert len(set(jobs_in(cluster))) == len(jobs_in(cluster)) and "started" not in said.read_text()
    ends = [stretches / plan.tree.last[name].id / "checkpoints/step_00000012" for name in ("clm-6-mlm30-12", "clm-12")]
    wait_until(lambda: all(end.exists() for end in ends), "the stretches")  # nobody drives
    third = start_driver(cluster, study, tmp_path / "third")
    assert third.wait(PATIENCE) == 0, (tmp_path / "third").read_text()
    for branch in plan.branches:
        assert steps_done(stretches / branch.id) == branch.steps  # none was done twice
    lines = [line for branch in plan.tree.path("clm-6-mlm30-12") for line in metrics(stretches / branch.id)]
    assert (lines, final_bits(ends[0].parents[1], 12)) == on_one_host(
        "phases.0.name=clm", "phases.1.name=mlm", ranks=1)
    for name in ("clm-6-mlm30-12", "clm-12"):
        assert json.loads((tmp_path / "out/models" / name / "export.json").read_text())["step"] == 12


@pytest.mark.slow
def test_a_driver_killed_at_twenty_moments_under_slurm(cluster, root, tmp_path):
    """With its jobs and without: the bits and the scores of models trained and fine-tuned alone. Two jobs at a time,
    on one node: on another they would wait a minute for the lock of one that was killed."""
    base = yaml.safe_load((root / "config.yaml").read_text())
    base |= {"checkpoint": {"every": 2, "keep": 2}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    finetune = {"datasets": [write_set(tmp_path / "toy", "SC")], "grid": {"learning_rates": [3e-3], "seeds": [0]},
                "training": {"batch_size": 16, "micro_batch_size": 8, "max_steps": 30, "max_length": 48}}
    study = write_study(root, tmp_path, ["clm-6-mlm30-40", "clm-20-mlm30-40", "clm-40"],
                        base=str(tmp_path / "base.yaml"), finetune=finetune,
                        slurm=SLURM | {"cpus_per_task": 4, "slurm_additional_parameters": {"nodelist": "node1"}})
    draw, kills, kills_of_jobs, watched = random.Random(1), 0, 0, NothingTwice(study)
    while kills < 20:
        driver = start_driver(cluster, study, tmp_path / f"{kills}.log")
        wait_for_a_word(driver, tmp_path / f"{kills}.log")
        time.sleep(draw.uniform(0, 8))
        if driver.poll() is not None:
            break
        with_jobs = draw.random() < 0.5
        kill_driver(cluster, driver)
        if with_jobs:  # the step alone, or the batch script with it
            cluster.hosts.head.run("scancel", "--user=root", "--state=RUNNING", "--signal=KILL",
                                   *["--full"] * draw.randint(0, 1), code=None)
            kills_of_jobs += 1
            time.sleep(1)
        watched.killed(with_jobs)
        kills += 1
    assert start_driver(cluster, study, tmp_path / "last.log").wait(600) == 0, (tmp_path / "last.log").read_text()
    print(f"{kills} kills of the driver, {kills_of_jobs} with its jobs")
    watched.check()
    assert kills == 20 and set(states(study).values()) == {"done"}
    check_against_models_alone(study)
    check_scores_of_models_alone(study, finetune)


def check_scores_of_models_alone(study: Path, finetune: dict) -> None:
    """Those of `check_against_models_alone`, exported and fine-tuned by themselves."""
    alone = study.parent / "alone"
    names = [recipe.name for recipe in plan_study(load_study(study)).recipes]
    for name in names:
        run_cli("export", alone / name, alone / "models" / name)
    (alone / "finetune.yaml").write_text(yaml.safe_dump({
        **finetune, "results": str(alone / "results"),
        "models": [{"name": name, "path": str(alone / "models" / name)} for name in names]}))
    run_cli("finetune", alone / "finetune.yaml")
    for name in names:
        ours, theirs = (root / "results" / name / "SC/toy/lr0.003_sd0" for root in (study.parent / "out", alone))
        assert (ours / "results.json").read_text() == (theirs / "results.json").read_text()
        assert losses(SimpleNamespace(directory=ours)) == losses(SimpleNamespace(directory=theirs))
