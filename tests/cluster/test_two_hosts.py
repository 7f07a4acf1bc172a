"""A run on two hosts, started by hand on each: the bits of one host, and what goes wrong between hosts is named."""

import json
import os
import re
import shutil
import signal

import pytest
from small_run import PATIENCE, outcome, run_cli, steps_done, wait_until
from virtual_cluster import PRETRAIN, ROOT, SOME_SECONDS, child_of, pid_on_its_host

from megatron_encdec.platform.meeting import SECONDS

pytestmark = pytest.mark.slurm


def ends(pair) -> list[tuple[int, str]]:
    """(exit code, output) of each."""
    return [(process.wait(PATIENCE), output.read_text()) for process, output in pair]


def test_two_hosts_give_the_bits_of_one(on_two, on_one_host, nodes, tmp_path):
    nodes[0].names.write_text(nodes[0].names.read_text() + "127.0.1.1 node1\n")  # Debian's way
    try:
        ended = ends(on_two())
    finally:
        nodes[0].names.write_text(nodes[0].names.read_text().replace("127.0.1.1 node1\n", ""))
    assert [code for code, _ in ended] == [0, 0], ended
    assert outcome(tmp_path / "run") == on_one_host()


def test_a_cut_cable_is_named_on_both_sides(on_two, nodes, tmp_path):
    pair = on_two("run.hang_timeout=8", "phases.0.steps=5000")
    wait_until(lambda: steps_done(tmp_path / "run") >= 3, "the first steps")
    nodes[1].plug(False)
    try:
        (code, said), (other, there) = ends(pair)
    finally:
        nodes[1].plug(True)
    assert code != 0 and other != 0
    assert "rank 1" in said and "node2" in said, said
    assert "node1" in there, there


def test_a_disk_that_is_not_shared_is_named(on_two, nodes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    nodes[1].run("mount", "-t", "tmpfs", "none", disk)
    try:
        ended = ends(on_two(run=disk / "run"))
    finally:
        nodes[1].run("umount", disk)
    assert [code for code, _ in ended] == [2, 2], ended
    assert f"run.dir: {disk / 'run'} on node2 is not the folder that rank 0 on node1 writes to" in ended[0][1]


def other_data(root, folder):
    """What is in `root`, with one more document."""
    folder.mkdir()
    shutil.copytree(root / "tokenizer", folder / "tokenizer")
    shutil.copy(root / "config.yaml", folder)
    with open(folder / "corpus.jsonl", "w") as file:
        file.write((root / "corpus.jsonl").read_text() + json.dumps({"text": "one more document"}) + "\n")
    run_cli("preprocess", "--input", folder / "corpus.jsonl", "--tokenizer", folder / "tokenizer",
            "--validation-percent", "10", "--workers", "1", "--output", folder / "text")
    return folder


@pytest.mark.parametrize("what", ["data", "config", "code"])
def test_hosts_that_differ_do_not_begin(what, on_two, nodes, root, tmp_path):
    code = None
    if what == "data":
        mounted = (other_data(root, tmp_path / "other"), root)
    elif what == "config":
        (tmp_path / "config").mkdir()
        text = (root / "config.yaml").read_text().replace("lr: 5.0e-3", "lr: 6.0e-3")
        (tmp_path / "config" / "config.yaml").write_text(text)
        mounted = (tmp_path / "config" / "config.yaml", root / "config.yaml")
    else:
        shutil.copytree(ROOT / "megatron_encdec", tmp_path / "code" / "megatron_encdec",
                        ignore=shutil.ignore_patterns("__pycache__"))
        with open(tmp_path / "code/megatron_encdec/training/loop.py", "a") as file:
            file.write("# another version\n")
        code = tmp_path / "code"
        mounted = (tmp_path / "code" / "megatron_encdec", ROOT / "megatron_encdec")
    nodes[1].run("mount", "--bind", *mounted)
    try:
        ended = ends(on_two(code=code))
    finally:
        nodes[1].run("umount", mounted[1])
    assert [code for code, _ in ended] == [2, 2], ended
    line = " ".join(said for _, said in ended)
    named = {"data": "the hash of data.", "config": "optimizer.lr is 0.006 instead of", "code": "the code of"}[what]
    assert named in line and "rank 1 on node2 differs from rank 0 on node1" in line, line
    assert steps_done(tmp_path / "run") == 0


@pytest.mark.skipif(not shutil.which("bindfs"), reason="needs bindfs, for a disk whose flock stays on each host")
def test_a_second_launch_is_refused_where_flock_reaches_no_other_host(nodes, root, tmp_path, begin):
    disk = tmp_path / "disk"
    disk.mkdir()
    for node in nodes[:2]:
        node.run("bindfs", disk, disk)
    try:
        run = disk / "run"
        words = (*PRETRAIN, root / "config.yaml", f"run.dir={run}", "phases.0.steps=100000")
        first, _ = begin(nodes[0], *words)
        wait_until(lambda: steps_done(run) >= 1, "the first step")
        second, output = begin(nodes[1], *words)
        assert second.wait(PATIENCE) == 2, output.read_text()
        assert "is in use by pid" in output.read_text() and "on node1" in output.read_text()
        assert first.poll() is None
        first.kill()
    finally:
        for node in nodes[:2]:
            node.run("umount", "--lazy", disk)


def test_a_run_of_two_hosts_saves_when_one_is_told_to_stop(on_two, on_one_host, nodes, tmp_path):
    pair = on_two(*SOME_SECONDS, "--stopped-exit-code", "85")
    wait_until(lambda: steps_done(tmp_path / "run") >= 3, "the first steps")
    nodes[1].signal(pair[1][0], 15)
    ended = ends(pair)
    assert [code for code, _ in ended] == [85, 85], ended
    assert "stopped by SIGTERM after step" in ended[0][1] and "checkpoint saved" in ended[0][1]
    step = steps_done(tmp_path / "run")
    assert outcome(tmp_path / "run")[0] == on_one_host(*SOME_SECONDS)[0][:step]


def test_a_dead_rank_is_named_on_both_hosts(on_two, tmp_path):
    pair = on_two("phases.0.steps=5000")
    wait_until(lambda: steps_done(tmp_path / "run") >= 3, "the first steps")
    victim = child_of(child_of(pair[1][0].pid))  # a rank of node 2's launcher
    number = pid_on_its_host(victim)
    os.kill(victim, signal.SIGKILL)
    for process, output in pair:
        assert process.wait(30) == 137
        assert f"rank 1 (pid {number} on node2) was killed by SIGKILL; ending the other ranks" in output.read_text()
    assert "rank 0: lost contact with another rank on node2 (" in pair[0][1].read_text()


def test_a_master_that_is_not_there_is_one_line(nodes, root, tmp_path, begin):
    wrong = {"10.77.0.99": "No route to host|timed out", "nowhere": "[Nn]ame"}
    started = [begin(nodes[1], *PRETRAIN, root / "config.yaml", f"run.dir={tmp_path / 'run'}", "--nnodes", "2",
                     "--node-rank", "1", "--nproc", "1", "--master", master, **{SECONDS: "4"}) for master in wrong]
    for (process, output), (master, why) in zip(started, wrong.items(), strict=True):
        assert process.wait(60) == 1
        assert re.fullmatch(rf"megatron-encdec: node 1 on node2 finds nobody of its job .* at {master}:29500-29507: .*"
                            rf"({why}).*, within 4 s; MASTER_ADDR has to name the host of node 0\n", output.read_text())
