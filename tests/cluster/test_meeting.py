"""How a job's processes find each other across hosts, and what is said of those that are missing or die."""

import re
import sys
import time

import pytest
from small_run import outcome, steps_done, wait_until
from virtual_cluster import PRETRAIN, ROOT

from megatron_encdec.platform.meeting import SECONDS

pytestmark = pytest.mark.slurm
SCRIPT = ("bash", ROOT / "examples" / "pretrain_biphasic.sh")


def test_the_example_starts_the_ranks_of_each_node(cluster, root, tmp_path, on_one_host):
    """And keeps to what srun has started, where that is a task a rank."""
    for tasks, run in (("1", tmp_path / "by_node"), ("2", tmp_path / "by_rank")):
        cluster.srun("--nodes", "2", "--ntasks-per-node", tasks, *SCRIPT, f"run.dir={run}", GPUS_PER_NODE="2",
                     CONFIG=str(root / "config.yaml"), MEGATRON_ENCDEC_PYTHON=sys.executable)
        assert outcome(run) == on_one_host(ranks=4)


def test_other_numbers_of_tasks_are_refused(cluster, root, tmp_path):
    done = cluster.srun("--nodes", "2", "--ntasks-per-node", "2", *PRETRAIN, root / "config.yaml",
                        f"run.dir={tmp_path / 'run'}", "--nproc", "4", code=2)
    assert "--nproc 4: srun has started 4 tasks on 2 nodes (2 a node)" in done.stderr


def test_a_host_that_does_not_come_is_named(cluster, root, tmp_path):
    """Slurm knows the hosts; the third one's task is at something else."""
    words = " ".join(map(str, [*PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}"]))
    began = time.monotonic()
    done = cluster.srun("--nodes", "3", "--ntasks-per-node", "1", "bash", "-c",
                        f'[ "$SLURM_NODEID" = 2 ] && exec sleep 30 || exec {words}', code=None,
                        **{SECONDS: "15"})
    assert re.search(r"^megatron-encdec: after 15 s 1 of 3 ranks have not come to node1:\d+: rank 2 \(none from "
                     r"node3\)$", done.stderr, re.MULTILINE), done.stderr
    assert time.monotonic() - began < 60


def test_a_master_that_is_not_there_is_one_line(nodes, root, tmp_path, begin):
    for master, why in (("10.77.0.99", "No route to host|timed out"), ("nowhere", "[Nn]ame")):
        process, output = begin(nodes[1], *PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}", "--nnodes",
                                "2", "--node-rank", "1", "--nproc", "1", "--master", master, **{SECONDS: "4"})
        assert process.wait(60) == 1
        assert re.fullmatch(rf"megatron-encdec: node 1 on node2 finds nobody of its job .* at {master}:29500-29507: .*"
                            rf"({why}).*, within 4 s; MASTER_ADDR has to name the host of node 0\n", output.read_text())


def test_a_dead_rank_is_named_on_both_hosts(on_two, nodes, tmp_path):
    pair = on_two("phases.0.steps=5000")
    wait_until(lambda: steps_done(tmp_path / "run") >= 3, "the first steps")
    launcher = nodes[1].run("pgrep", "--full", "--oldest", "pretrain").stdout.strip()  # pids as node 2 has them
    victim = nodes[1].run("pgrep", "--parent", launcher).stdout.strip()
    nodes[1].run("kill", "-KILL", victim)
    for process, output in pair:
        assert process.wait(30) == 137
        assert f"rank 1 (pid {victim} on node2) was killed by SIGKILL; ending the other ranks" in output.read_text()
    assert "rank 0: lost contact with another rank on node2 (" in pair[0][1].read_text()
