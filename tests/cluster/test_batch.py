"""The batch scripts of examples/slurm under a real Slurm."""

import json
import re
import statistics
import time

import pytest
import yaml
from finetune_sets import write_model, write_set
from small_run import outcome, run_cli, steps_done, wait_until
from virtual_cluster import PRETRAIN, ROOT, SOME_SECONDS

pytestmark = pytest.mark.slurm
SCRIPTS = ROOT / "examples" / "slurm"


def test_a_script_that_is_no_batch_script_names_the_one_to_submit(cluster, submit, tmp_path):
    for script, right in (("pretrain_biphasic.sh", "pretrain.sbatch"), ("continue_from_hf.sh", "pretrain.sbatch"),
                          ("finetune.sh", "finetune.sbatch")):
        job = submit("--output", tmp_path / script, ROOT / "examples" / script)
        assert cluster.wait_for(job, "FAILED")["ExitCode"] == "2:0"
        said = (tmp_path / script).read_text()
        assert f"sbatch examples/slurm/{right} CONFIG" in said and len(said.splitlines()) == 1


def test_a_run_survives_a_power_cut_and_a_requeue_with_the_same_bits(cluster, nodes, root, tmp_path, submit,
                                                                     on_one_host):
    """The third node takes the dead one's place; nothing in the command or the config says so."""
    expected, run, output = on_one_host(*SOME_SECONDS), tmp_path / "run", tmp_path / "output"
    job = submit("--nodes", "2", "--output", output, SCRIPTS / "pretrain.sbatch",
                 root / "config.yaml", f"run.dir={run}", "run.hang_timeout=8", *SOME_SECONDS, "--nproc", "1",
                 MEGATRON_ENCDEC_LOCK_SECONDS="15")
    wait_until(lambda: steps_done(run) >= 30, "a checkpoint")
    victim = next(node for node in nodes[::-1] if node.name in names_of(cluster.job(job)["NodeList"]))
    victim.power_off()
    try:
        cluster.wait_for(job, "COMPLETED")
    finally:
        cluster.power_on(victim)
        cluster.wait_for_nodes(3)
    assert outcome(run) == expected, output.read_text()
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert len([line for line in (run / "metrics.jsonl").read_text().splitlines() if '"resume"' in line]) >= 1
    assert not list(tmp_path.glob("*.launches"))


def names_of(nodelist: str) -> set[str]:
    """`node[1,3]` or `node[1-2]` -> names."""
    spans = [span.partition("-") for span in re.findall(r"\d+(?:-\d+)?", nodelist)]
    return {f"node{number}" for first, _, last in spans for number in range(int(first), int(last or first) + 1)}


def test_a_run_that_makes_no_progress_is_not_requeued_for_ever(cluster, root, tmp_path, submit):
    output = tmp_path / "output"
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so is gone')")
    job = submit("--nodes", "1", "--output", output, SCRIPTS / "pretrain.sbatch", root / "config.yaml",
                 f"run.dir={tmp_path / 'run'}", "--nproc", "2", LAUNCHES="2",
                 PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert cluster.wait_for(job, "FAILED")["Restarts"] == "2"
    assert "2 launches in a row came no further than no checkpoint" in output.read_text()


def test_a_mistake_ends_the_job_at_once(cluster, root, tmp_path, submit):
    job = submit("--nodes", "1", "--output", tmp_path / "output", SCRIPTS / "pretrain.sbatch", root / "config.yaml",
                 f"run.dir={tmp_path / 'run'}", "optimizer.lrr=1", "--nproc", "1")
    ended = cluster.wait_for(job, "FAILED")
    said = (tmp_path / "output").read_text()
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), said
    assert said.count("optimizer.lrr") == 1, said


def test_an_array_preprocesses_and_a_dependent_job_merges(cluster, root, tmp_path, submit):
    words = ("--input", root / "corpus.jsonl", "--tokenizer", root / "tokenizer", "--validation-percent", "10")
    submit("--array", "1-3", "--cpus-per-task", "1", SCRIPTS / "preprocess.sbatch", tmp_path / "text", *words,
           "--workers", "1")
    merged = tmp_path / "text.manifest.json"
    wait_until(merged.exists, "the merge")
    assert json.loads(merged.read_text())["documents"] == json.loads((root / "text.manifest.json").read_text())[
        "documents"]
    for name in ("text.bin", "text.idx", "text.validation.bin"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()


def test_an_array_that_does_not_begin_at_1_is_refused(cluster, tmp_path, submit):
    job = submit("--array", "2-3", "--cpus-per-task", "1", "--output", tmp_path / "output_%a",
                 SCRIPTS / "preprocess.sbatch", tmp_path / "text", "--input", "x")
    assert cluster.wait_for(f"{job}_2", "FAILED")["ExitCode"] == "2:0"
    assert "sbatch --array 1-N" in (tmp_path / "output_2").read_text()


@pytest.mark.slow
def test_from_sbatch_to_a_finished_run_through_two_time_limits_and_a_power_cut(cluster, nodes, root, tmp_path, submit,
                                                                               on_one_host):
    """Nobody touches it; minutes, since Slurm counts time limits in them. A launch after the power cut needs its start,
    a minute for the dead one's lock, and a save: on a busy machine that is more than two of them. Steps as many as are
    done in the time of two launches, at the speed of now."""
    began = time.monotonic()
    nodes[0].run(*PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'speed'}", "--nproc", "2")
    minutes = 2 + int((time.monotonic() - began) // 20)
    lines = [json.loads(line) for line in (tmp_path / "speed/metrics.jsonl").read_text().splitlines()]
    rate = statistics.median(line["tokens_per_second"] for line in lines if line["kind"] == "train") / 512
    half = max(60, int(60 * minutes * rate))
    steps = (f"phases.0.steps={half}", f"phases.1.steps={half}", f"checkpoint.every={max(10, half // 30)}")
    run, output = tmp_path / "run", tmp_path / "output"
    job = submit("--nodes", "2", "--time", minutes, "--signal", "USR1@20", "--output", output,
                 SCRIPTS / "pretrain.sbatch", root / "config.yaml", f"run.dir={run}", "run.hang_timeout=8", *steps,
                 "--nproc", "1")
    expected = on_one_host(*steps)
    wait_until(lambda: output.exists() and output.read_text().count("stopped in time, requeued") >= 2,
               "two time limits")
    before = steps_done(run)
    wait_until(lambda: steps_done(run) > before + half // 20, "further steps")
    victim = next(node for node in nodes if node.name == cluster.job(job)["BatchHost"])
    victim.power_off()
    began = time.monotonic()
    try:
        cluster.wait_for(job, "COMPLETED")
    finally:
        cluster.power_on(victim)
        cluster.wait_for_nodes(3)
    print(f"{2 * half} steps; {time.monotonic() - began:.0f} s from the power cut to the end")
    assert outcome(run) == expected, output.read_text()


@pytest.mark.slow
@pytest.mark.nemo
def test_an_array_of_workers_finetunes_on_one_results_tree(cluster, tmp_path, submit):
    """By NeMo, on two nodes: each run is done once, and its results are those of one machine."""
    config, tree = tmp_path / "finetune.yaml", tmp_path / "results"
    config.write_text(yaml.safe_dump({
        "results": str(tree), "models": [{"name": "euro", "path": str(write_model(tmp_path / "euro"))}],
        "datasets": [write_set(tmp_path / "toy", "SC")],
        "grid": {"learning_rates": [1e-3, 3e-3], "seeds": [0, 1]}, "sweep": {"workers": 1},
        "training": {"batch_size": 16, "micro_batch_size": 8, "max_steps": 30, "max_length": 48}}))
    job = submit("--array", "1-2", "--nodes", "1", "--exclusive", SCRIPTS / "finetune.sbatch", config)
    ended = [cluster.wait_for(f"{job}_{task}", "COMPLETED") for task in (1, 2)]
    assert {one["NodeList"] for one in ended} == {"node1", "node2"}
    said = "".join((tmp_path / f"finetune-{job}_{task}.out").read_text() for task in (1, 2))
    assert len(re.findall(r"^\d/4  .*  validation \d", said, re.MULTILINE)) == 4, said
    run_cli("finetune", config, f"results={tmp_path / 'alone'}")
    found = {path.relative_to(tree): path.read_text() for path in tree.rglob("results.json")}
    assert len(found) == 4
    assert {path: (tmp_path / "alone" / path).read_text() for path in found} == found


def test_finetune_array_is_refused_without_a_config(cluster, submit, tmp_path):
    job = submit("--array", "1", "--cpus-per-task", "1", "--output", tmp_path / "output", SCRIPTS / "finetune.sbatch")
    assert cluster.wait_for(job, "FAILED")["ExitCode"] == "2:0"
    assert "no CONFIG" in (tmp_path / "output").read_text()
