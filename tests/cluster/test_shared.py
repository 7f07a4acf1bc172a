"""What the nodes of a job have in common, and what two sweeps on two nodes make together."""

import json
import re
import sys

import pytest
from small_run import PATIENCE

pytestmark = pytest.mark.slurm


def test_doctor_puts_the_nodes_of_a_job_side_by_side(cluster, nodes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    runs = disk / "runs"  # not there yet
    nodes[1].run("mount", "-t", "tmpfs", "none", disk)
    try:
        said = cluster.srun("--nodelist", "node1,node2", "--ntasks-per-node", "1", sys.executable, "-m",
                            "megatron_encdec", "doctor", "--nodes", "--directory", runs, code=1).stdout
    finally:
        nodes[1].run("umount", disk)
    assert "equal on all 2: python" in said and "devices cpu" in said
    assert re.search(r"^1 +node2 +[+-]0\.\d+ s +eth0 +\d+\.\d\d GB/s ", said, re.MULTILINE), said
    assert f"rank 1 on node2: {runs} is not the folder that rank 0 writes to" in said


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
