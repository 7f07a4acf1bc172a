"""Runs under a real Slurm: srun in its forms, and the batch scripts of examples/slurm."""

import json
import re
import sys
import time

import pytest
from small_run import PATIENCE, outcome, steps_done, wait_until
from virtual_cluster import PRETRAIN, ROOT, SOME_SECONDS

pytestmark = pytest.mark.slurm
SCRIPTS = ROOT / "examples" / "slurm"


@pytest.fixture
def submit(cluster, tmp_path):
    """A function: sbatch with the words, from `tmp_path`; the job's number. It ends with the test."""
    jobs = []

    def call(*words, **environment) -> int:
        jobs.append(cluster.sbatch("--chdir", tmp_path, *words, MEGATRON_ENCDEC_PYTHON=sys.executable, **environment))
        return jobs[-1]

    yield call
    cluster.hosts.head.run("scancel", "--signal=KILL", "--full", *jobs, code=None)
    cluster.hosts.head.run("scancel", *jobs, code=None)


@pytest.mark.parametrize(("form", "words"), [
    ("a task a rank", ("--nodes", "2", "--ntasks-per-node", "1")),
    ("a task a rank, two on a node", ("--nodes", "1", "--ntasks-per-node", "2")),
    ("a task a node, which starts its ranks", ("--nodes", "2", "--ntasks-per-node", "1"))])
def test_srun(form, words, cluster, root, tmp_path, on_one_host):
    launched = ("--nproc", "2") if "starts" in form else ()
    cluster.srun(*words, *PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}", *launched)
    assert outcome(tmp_path / "run") == on_one_host(ranks=4 if launched else 2)


def test_srun_on_a_part_of_a_larger_job(cluster, root, tmp_path, on_one_host, submit):
    """The step's own nodes are those that meet, not the job's first."""
    words = " ".join(map(str, [*PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}"]))
    job = submit("--nodes", "3", "--ntasks-per-node", "2", "--output", tmp_path / "output", "--wrap",
                 f"srun --nodes 1 --ntasks 2 --nodelist node2 {words}")
    cluster.wait_for(job, "COMPLETED")
    assert outcome(tmp_path / "run") == on_one_host()


def test_a_command_that_forgot_srun_says_so(cluster, root, tmp_path, submit):
    words = " ".join(map(str, [*PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}"]))
    job = submit("--nodes", "2", "--ntasks-per-node", "1", "--output", tmp_path / "output", "--wrap", words)
    assert cluster.wait_for(job, "FAILED")["ExitCode"] == "2:0"
    assert "put srun before the command" in (tmp_path / "output").read_text()


def test_two_jobs_with_one_head_node_do_not_meet(cluster, nodes, root, tmp_path, begin, on_one_host):
    """Both would like the same port."""
    head = cluster.hosts.head
    jobs = [begin(head, "srun", "--nodelist", f"node1,{other}", "--ntasks-per-node", "1", *PRETRAIN,
                  root / "config.yaml", f"run.dir={tmp_path / other}", MASTER_PORT="29500")
            for other in ("node2", "node3")]
    assert [process.wait(PATIENCE) for process, _ in jobs] == [0, 0], [output.read_text() for _, output in jobs]
    assert outcome(tmp_path / "node2") == outcome(tmp_path / "node3") == on_one_host()


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
                 root / "config.yaml", f"run.dir={run}", "run.hang_timeout=8", *SOME_SECONDS, "--nproc", "1")
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
    job = submit("--nodes", "2", "--output", tmp_path / "output", SCRIPTS / "pretrain.sbatch", root / "config.yaml",
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


def test_doctor_puts_the_nodes_of_a_job_side_by_side(cluster, nodes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    nodes[1].run("mount", "-t", "tmpfs", "none", disk)
    try:
        said = cluster.srun("--nodelist", "node1,node2", "--ntasks-per-node", "1", sys.executable, "-m",
                            "megatron_encdec", "doctor", "--nodes", "--directory", disk, code=1).stdout
    finally:
        nodes[1].run("umount", disk)
    assert "equal on all 2: python" in said and "devices cpu" in said
    assert re.search(r"^1 +node2 +[+-]0\.\d+ s +eth0 +\d+\.\d\d GB/s ", said, re.MULTILINE), said
    assert f"rank 1 on node2: {disk} is not the folder that rank 0 writes to" in said


def test_two_sweeps_share_one_tree(cluster, tmp_path, nodes, begin):
    """On two nodes, with grids that overlap: each run is done once, and none is lost from what both write."""
    tree = tmp_path / "tree"
    pair = [begin(cluster.hosts.head, "srun", "--nodelist", node.name, sys.executable, "-m", "sweep_runs", tree, "1",
                  rates, "4", "slow") for node, rates in zip(nodes[:2], ("0.1,0.2,0.3", "0.2,0.3,0.5"), strict=True)]
    assert [process.wait(PATIENCE) for process, _ in pair] == [0, 0], [output.read_text() for _, output in pair]
    said = [json.loads(output.read_text().splitlines()[-1]) for _, output in pair]
    assert all(one["finished"] == 12 and one["left"] == 0 for one in said)
    assert sum(one["ran"] for one in said) == 16
    (grid,) = tree.rglob("grid.json")
    assert len(json.loads(grid.read_text())["runs"]) == 16


@pytest.mark.slow
def test_from_sbatch_to_a_finished_run_through_two_time_limits_and_a_power_cut(cluster, nodes, root, tmp_path, submit,
                                                                               on_one_host):
    """Nobody touches it; minutes, since Slurm counts time limits in them."""
    steps = ("phases.0.steps=3000", "phases.1.steps=3000", "checkpoint.every=100")
    expected, run, output = on_one_host(*steps), tmp_path / "run", tmp_path / "output"
    job = submit("--nodes", "2", "--time", "1", "--signal", "USR1@20", "--output", output,
                 SCRIPTS / "pretrain.sbatch", root / "config.yaml", f"run.dir={run}", "run.hang_timeout=8", *steps,
                 "--nproc", "1")
    wait_until(lambda: output.exists() and output.read_text().count("stopped in time, requeued") == 2,
               "two time limits", 600)
    before = steps_done(run)
    wait_until(lambda: steps_done(run) > before + 60, "further steps")
    victim = next(node for node in nodes if node.name == cluster.job(job)["BatchHost"])
    victim.power_off()
    began = time.monotonic()
    try:
        cluster.wait_for(job, "COMPLETED")
    finally:
        cluster.power_on(victim)
        cluster.wait_for_nodes(3)
    print(f"{time.monotonic() - began:.0f} s from the power cut to the end")
    assert outcome(run) == expected, output.read_text()


def test_finetune_array_is_refused_without_a_config(cluster, submit, tmp_path):
    job = submit("--array", "1", "--cpus-per-task", "1", "--output", tmp_path / "output", SCRIPTS / "finetune.sbatch")
    assert cluster.wait_for(job, "FAILED")["ExitCode"] == "2:0"
    assert "no CONFIG" in (tmp_path / "output").read_text()
