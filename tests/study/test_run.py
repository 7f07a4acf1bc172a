"""`study run` for real: stretches trained once, bits as of models trained alone, drivers killed while jobs work."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_run import PATIENCE, metrics, run_cli, start_cli, steps_done, wait_until
from small_study import NothingTwice, check_against_models_alone, states, write_study

from megatron_encdec.platform.errors import UserError
from megatron_encdec.study.config import load_study
from megatron_encdec.study.plan import plan_study


def jobs_of(study: Path) -> list[int]:
    """Processes that hold the lock of a job."""
    found = []
    for record in (study.parent / "out" / "jobs").rglob("job.json"):
        pid = json.loads(record.read_text())["pid"]
        if Path(f"/proc/{pid}/cmdline").exists() and b"megatron_encdec" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


def test_a_study_survives_its_driver_and_equals_its_models_trained_alone(root, tmp_path):
    """The driver is killed while a stretch trains: the job goes on, the next driver finds it, no step is done twice."""
    study = write_study(root, tmp_path, ["clm-3-mlm30-9", "clm-9"], checkpoints=[2])
    driver = start_cli("study", "run", study, output=tmp_path / "first.log")
    first = plan_study(load_study(study)).branches[0]
    run = tmp_path / "out/stretches" / first.id
    wait_until(lambda: steps_done(run) > 0, "the first stretch")
    driver.kill()
    driver.wait()
    second = run_cli("study", "run", study)
    assert set(states(study).values()) == {"done"}
    assert steps_done(run) == 3 and not metrics(run, "resume")
    for name in ("clm-3-mlm30-9", "clm-9", "clm-3-mlm30-9@2"):
        assert (tmp_path / "out/models" / name / "export.json").is_file()
    assert f"{first.id}@3: checkpoint deleted" in second.stdout
    assert "all is done" in run_cli("study", "run", study).stdout
    check_against_models_alone(study)
    late = run_cli("study", "plan", study, "checkpoints=[1]").stdout
    assert "not scored: clm-3-mlm30-9@1: there is no checkpoint" in late


def test_a_stretch_that_fails_stops_only_what_depends_on_it(root, tmp_path):
    study = write_study(root, tmp_path, ["clm-6", "mlm30-6"])
    plan = plan_study(load_study(study))
    broken = tmp_path / "out/stretches" / plan.tree.last["clm-6"].id
    broken.mkdir(parents=True)
    (broken / "checkpoints").write_text("a file where a directory belongs")
    ended = run_cli("study", "run", study, code=1)
    assert f"stretches/{broken.name}: ended with exit code 2" in ended.stderr
    assert "is not a directory" in ended.stderr and "log.txt" in ended.stderr and "Traceback" not in ended.stderr
    assert "1 failed, 1 wait for them" in ended.stderr
    assert (tmp_path / "out/models/mlm30-6/export.json").is_file()
    assert not (tmp_path / "out/models/clm-6").exists()


def test_two_drivers_at_once(root, tmp_path):
    study = write_study(root, tmp_path, ["clm-6"])
    driver = start_cli("study", "run", study, "--stopped-exit-code", "77", output=tmp_path / "first.log")
    try:
        wait_until(lambda: (tmp_path / "out/jobs").exists(), "the first job")
        second = run_cli("study", "run", study, code=2)
        assert "is in use by pid" in second.stderr and second.stderr.count("\n") == 1
    finally:
        driver.send_signal(signal.SIGTERM)
        assert driver.wait() == 77
    assert not jobs_of(study)  # SIGTERM ends the jobs too


def test_what_this_machine_can_never_run_is_refused_before_anything_starts(root, tmp_path):
    study = write_study(root, tmp_path, ["clm-6"], resources={"base": {"nodes": 2}})
    ended = run_cli("study", "run", study, code=2)
    assert "resources ask for 2 nodes" in ended.stderr and "--executor slurm" in ended.stderr
    assert not (tmp_path / "out/jobs").exists()


def test_another_export_of_that_name_does_not_count(root, tmp_path):
    """One of an earlier study stands there, beside a file that no export wrote: the job fails, and not for ever."""
    study = write_study(root, tmp_path, ["clm-6"])
    other = tmp_path / "out/models/clm-6"
    other.mkdir(parents=True)
    (other / "export.json").write_text('{"history_hash": "another", "files": ["export.json"]}')
    (other / "notes.txt").write_text("mine")
    ended = run_cli("study", "run", study, code=1)
    assert "models/clm-6: ended with exit code 2" in ended.stderr and "notes.txt" in ended.stderr
    assert (other / "notes.txt").read_text() == "mine"


def test_scores_and_exports_of_another_state_do_not_count(root, tmp_path):
    """The base changes under a finished study: the results of its first life are not passed off as the second's."""
    from result_trees import write_run

    from megatron_encdec.finetune.results_tree import record_model
    from megatron_encdec.study.jobs import jobs_of
    from megatron_encdec.study.report import report_study
    from megatron_encdec.study.store import Status, Store

    dataset = {"name": "toy", "family": "SC", "train": "a.jsonl", "test": "b.jsonl"}
    study = write_study(root, tmp_path, ["clm-6"], finetune={
        "datasets": [dataset], "grid": {"learning_rates": [1e-5], "seeds": [0]}})
    plan, out = plan_study(load_study(study)), tmp_path / "out"
    model = out / "models/clm-6"
    model.mkdir(parents=True)
    (model / "weights").write_text("some")
    (model / "export.json").write_text(json.dumps({"step": 6, "history_hash": plan.branches[0].hash_at(6),
                                                   "files": ["export.json", "weights"]}))
    write_run(out / "results/clm-6/SC/toy/lr1e-05_sd0", 0.5, 0.5)
    record_model(out / "results", "clm-6", model, ["clm-6"])
    assert not jobs_of(Status(plan, Store(out))).keys() - {"stretches/clm-6_" + plan.branches[0].id[-8:]}
    (model / "weights").write_text("")  # damaged
    assert "models/clm-6" in jobs_of(Status(plan, Store(out)))
    study = write_study(root, tmp_path, ["clm-6"], base=str(_other_base(root, tmp_path)), finetune={
        "datasets": [dataset], "grid": {"learning_rates": [1e-5], "seeds": [0]}})
    later = plan_study(load_study(study))
    assert {"models/clm-6", "results/clm-6"} <= jobs_of(Status(later, Store(out))).keys()
    with pytest.raises(UserError, match="results/clm-6: these results are of another model"):
        report_study(later)


def _other_base(root: Path, directory: Path) -> Path:
    path = directory / "other.yaml"
    path.write_text((root / "config.yaml").read_text().replace("lr: 5.0e-3", "lr: 4.0e-3"))
    return path


@pytest.fixture
def small_disk(tmp_path):
    """`tmp_path/out` is a file system of 4 MiB."""
    disk = tmp_path / "out"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk, root, tmp_path):
    """It fills up while the first stretch trains. Said in a line for each job; the same command goes on when there is
    room, and ends with the bits of models trained alone."""
    study = write_study(root, tmp_path, ["clm-3-mlm30-9", "clm-9"])
    run = small_disk / "stretches" / plan_study(load_study(study)).branches[0].id
    driver = start_cli("study", "run", study, output=tmp_path / "first.log")
    wait_until(lambda: steps_done(run) > 0, "the first stretch")
    fill(small_disk / "filler")
    assert driver.wait(PATIENCE) == 1
    said = (tmp_path / "first.log").read_text()
    print(said)
    assert "No space left on device" in said and "Traceback" not in said
    again = run_cli("study", "run", study, check=False)
    assert again.returncode in (1, 2) and "No space left on device" in again.stderr
    assert "Traceback" not in again.stderr
    (small_disk / "filler").unlink()
    run_cli("study", "run", study)
    assert set(states(study).values()) == {"done"}
    check_against_models_alone(study)


def fill(path: Path) -> None:
    """Write until nothing more goes in."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 512):
            pass


@pytest.mark.slow
def test_a_driver_killed_at_twenty_moments(root, tmp_path):
    """With its jobs and without: five models through one trunk end with the bits of models trained alone."""
    study = write_study(root, tmp_path, ["clm-3-mlm30-12", "clm-6-mlm30-12", "clm-6-mlm50-12", "clm-12",
                                         "clm-dec12-mlm30-18"], checkpoints=[5])
    draw, kills, kills_of_jobs, watched = random.Random(1), 0, 0, NothingTwice(study)
    while kills < 20:
        driver = start_cli("study", "run", study, "--jobs", "2", output=tmp_path / f"{kills}.log")
        time.sleep(draw.uniform(2, 7))
        if driver.poll() is not None:
            break
        with_jobs, pids = draw.random() < 0.5, jobs_of(study)
        driver.kill()
        driver.wait()
        for pid in pids if with_jobs else ():
            os.kill(pid, signal.SIGKILL)
            kills_of_jobs += 1
        watched.killed(with_jobs)
        kills += 1
        time.sleep(draw.uniform(0, 1))
    run_cli("study", "run", study)
    print(f"{kills} kills of the driver, {kills_of_jobs} of jobs")
    watched.check()
    resumes = sum(len(metrics(run, "resume")) for run in (tmp_path / "out/stretches").iterdir())
    assert kills == 20 and resumes <= kills_of_jobs
    assert set(states(study).values()) == {"done"}
    check_against_models_alone(study)
