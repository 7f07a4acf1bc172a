"""srun in its forms: which processes are ranks of a job, how they meet, and what is said where they cannot."""

import re
import sys
import time

import pytest
from small_run import PATIENCE, outcome
from virtual_cluster import PRETRAIN, ROOT

from megatron_encdec.platform.meeting import SECONDS

pytestmark = pytest.mark.slurm
EXAMPLE = ROOT / "examples" / "pretrain_biphasic.sh"


def test_a_task_a_node_starts_its_ranks(cluster, root, tmp_path, on_one_host):
    cluster.srun("--nodes", "2", "--ntasks-per-node", "1", "bash", EXAMPLE, f"run.dir={tmp_path / 'run'}",
                 GPUS_PER_NODE="2", CONFIG=str(root / "config.yaml"), MEGATRON_ENCDEC_PYTHON=sys.executable)
    assert outcome(tmp_path / "run") == on_one_host(ranks=4)


def test_a_task_a_rank_on_a_part_of_a_larger_job(cluster, root, tmp_path, on_one_host, submit):
    """The step's own nodes are those that meet, not the job's first; the example keeps to the ranks that srun has
    started."""
    job = submit("--nodes", "3", "--ntasks-per-node", "2", "--output", tmp_path / "output", "--wrap",
                 f"srun --nodes 1 --ntasks 2 --nodelist node2 bash {EXAMPLE} run.dir={tmp_path / 'run'}",
                 GPUS_PER_NODE="2", CONFIG=str(root / "config.yaml"))
    cluster.wait_for(job, "COMPLETED")
    assert outcome(tmp_path / "run") == on_one_host()


def test_two_jobs_of_a_task_a_rank_with_one_head_node_do_not_meet(cluster, root, tmp_path, begin, on_one_host):
    """Both would like the same port."""
    head = cluster.hosts.head
    jobs = [begin(head, "srun", "--nodelist", f"node1,{other}", "--ntasks-per-node", "1", *PRETRAIN,
                  root / "config.yaml", f"run.dir={tmp_path / other}", MASTER_PORT="29500")
            for other in ("node2", "node3")]
    assert [process.wait(PATIENCE) for process, _ in jobs] == [0, 0], [output.read_text() for _, output in jobs]
    assert outcome(tmp_path / "node2") == outcome(tmp_path / "node3") == on_one_host()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "words"), [
    ("a task a rank", ("--nodes", "2", "--ntasks-per-node", "1")),
    ("a task a rank, two on a node", ("--nodes", "1", "--ntasks-per-node", "2")),
    ("a task a node, which starts its ranks", ("--nodes", "2", "--ntasks-per-node", "1"))])
def test_srun(form, words, cluster, root, tmp_path, on_one_host):
    launched = ("--nproc", "2") if "starts" in form else ()
    cluster.srun(*words, *PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}", *launched)
    assert outcome(tmp_path / "run") == on_one_host(ranks=4 if launched else 2)


def test_a_command_that_forgot_srun_says_so(cluster, root, tmp_path, submit):
    words = " ".join(map(str, [*PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}"]))
    job = submit("--nodes", "2", "--ntasks-per-node", "1", "--output", tmp_path / "output", "--wrap", words)
    assert cluster.wait_for(job, "FAILED")["ExitCode"] == "2:0"
    assert "put srun before the command" in (tmp_path / "output").read_text()


def test_other_numbers_of_tasks_are_refused(cluster, root, tmp_path):
    done = cluster.srun("--nodes", "2", "--ntasks-per-node", "2", *PRETRAIN, root / "config.yaml",
                        f"run.dir={tmp_path / 'run'}", "--nproc", "4", code=2)
    assert "--nproc 4: srun has started 4 tasks on 2 nodes (2 a node)" in done.stderr


def test_a_host_that_does_not_come_is_named(cluster, root, tmp_path):
    """Slurm knows the hosts; the third one's task is at something else."""
    words = " ".join(map(str, [*PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}"]))
    began = time.monotonic()
    done = cluster.srun("--nodes", "3", "--ntasks-per-node", "1", "bash", "-c",
                        f'[ "$SLURM_NODEID" = 2 ] && exec sleep 12 || exec {words}', code=None,
                        **{SECONDS: "8"})
    assert re.search(r"^megatron-encdec: after 8 s 1 of 3 ranks have not come to node1:\d+: rank 2 \(none from "
                     r"node3\)$", done.stderr, re.MULTILINE), done.stderr
    assert time.monotonic() - began < 60
