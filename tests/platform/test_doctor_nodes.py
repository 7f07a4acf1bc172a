"""doctor --nodes: what it says of nodes that differ; tests/cluster has it on several hosts."""

import os
from dataclasses import replace

import pytest
from small_run import start_cli

from megatron_encdec.platform.doctor_nodes import Node, odd_ones, table

SAME = {"python": "3.12.3", "code": "0123456789ab", "torch": "2.13.0", "apex": "missing"}


def nodes(*changes: dict, count: int = 4) -> list[Node]:
    """So many, two ranks on a host; `changes` of the last ones."""
    found = [Node(rank, f"node{rank // 2}", SAME, "eth0", 0.001 * rank, 8e9 if rank % 2 else 2e9, 100 << 30, True)
             for rank in range(count)]
    last = count - len(changes)
    return found[:last] + [replace(node, **change) for node, change in zip(found[last:], changes, strict=True)]


def test_nodes_that_fit():
    assert odd_ones(nodes(), "runs") == []
    lines = table(nodes())
    assert lines[0] == "equal on all 4: python 3.12.3, code 0123456789ab, torch 2.13.0"
    assert lines[2].split() == ["rank", "host", "clock", "interface", "link", "free"]
    assert lines[4].split() == ["1", "node0", "+0.001", "s", "eth0", "8.00", "GB/s", "100.0", "GiB"]


@pytest.mark.parametrize(("change", "said"), [
    ({"same": {**SAME, "torch": "2.12.1"}}, "rank 3 on node1: torch is 2.12.1, elsewhere 2.13.0"),
    ({"same": {**SAME, "code": "ff"}}, "rank 3 on node1: code is ff, elsewhere 0123456789ab"),
    ({"same": {**SAME, "nccl": "2.28"}}, "rank 3 on node1: nccl is 2.28, elsewhere missing"),
    ({"clock": -7.0}, "rank 3 on node1: its clock is -7.0 s from that of rank 0"),
    ({"sees": False, "free": None}, "rank 3 on node1: runs is not the folder that rank 0 writes to"),
    ({"free": 1 << 30}, "rank 3 on node1: runs has 1.0 GiB left"),
    ({"link": 1e9}, "rank 3 on node1: 1.00 GB/s from rank 2, the median is 4.50 GB/s")])
def test_the_odd_one_is_named(change, said):
    (line,) = odd_ones(nodes(change), "runs")
    assert line.startswith(said)


def test_a_link_is_compared_with_those_of_its_kind():
    """Between hosts it is slower than within one, and that is no fault."""
    assert odd_ones(nodes({"link": 2e9}, {"link": 0.5e9}, {"link": 8e9}, count=9), "runs") == [
        "rank 7 on node3: 0.50 GB/s from rank 6, the median is 8.00 GB/s"]


def test_many_odd_ones_are_one_line():
    odd = [{"same": {**SAME, "torch": "2.12.1"}}] * 6
    assert odd_ones(nodes(*odd, count=20), "runs") == [
        "rank 14 on node7, rank 15 on node7, rank 16 on node8, rank 17 on node8 and 2 more: torch is 2.12.1, elsewhere "
        "2.13.0"]


def test_what_differs_has_a_column():
    lines = table(nodes({"same": {**SAME, "torch": "2.12.1"}}))
    assert "torch" not in lines[0] and lines[2].endswith("torch") and lines[-1].endswith("2.12.1")


def test_one_process_alone_is_told_how_to_start_several(tmp_path):
    process = start_cli("doctor", "--nodes", output=tmp_path / "output", SLURM_JOB_ID="")
    assert process.wait(60) == 2
    assert "srun --ntasks-per-node 1" in (tmp_path / "output").read_text()


def test_two_nodes_by_hand(tmp_path):
    port = str(20000 + os.getpid() % 10000)
    pair = [start_cli("doctor", "--nodes", "--nnodes", "2", "--node-rank", rank, "--master", f"127.0.0.1:{port}",
                      "--directory", tmp_path, output=tmp_path / f"output{rank}") for rank in range(2)]
    codes = {process.wait(90) for process in pair}
    said = (tmp_path / "output0").read_text()
    assert len(codes) == 1 and "equal on all 2: python" in said, said
    assert (tmp_path / "output1").read_text() == ""
    assert codes == {0} or "GiB left" in said, said  # a full disk is one to be named
    assert not list(tmp_path.glob(".doctor-*"))
