"""Several nodes by our launcher, on one host: `--nnodes N --node-rank R`, one launcher a node."""

import os
import re
import signal
import time

import pytest
from small_run import PATIENCE, final_bits, fork_cli, metrics, ranks_of, steps_done, wait_until

from megatron_encdec.platform.meeting import SECONDS, port_of

LONG = ("phases.0.steps=2000", "phases.1.steps=2000")


@pytest.fixture
def nodes(root, tmp_path):
    """A function: launchers of two nodes, or those of them that are asked for, with a rank each; and their words."""
    master = f"127.0.0.1:{port_of(str(tmp_path))}"
    started = []

    def call(*arguments, which=(0, 1), master=master, **environment):
        said = [tmp_path / f"said{node}" for node in which]
        launchers = [fork_cli("pretrain", root / "config.yaml", f"run.dir={tmp_path / 'run'}", "--nnodes", "2",
                              "--node-rank", node, "--nproc", "1", "--master", master, *arguments,
                              said=[tmp_path / f"said{node}"] * 2, **environment) for node in which]
        started.extend(launchers)
        return launchers, said

    yield call
    for process in started:
        if process.poll() is None:
            for pid in [*ranks_of(process), process.pid]:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def ended(launchers) -> list[int]:
    """Exit codes."""
    return [launcher.wait(PATIENCE) for launcher in launchers]


def test_two_nodes_give_the_bits_of_one(nodes, pretrain, tmp_path):
    launchers, said = nodes()
    assert ended(launchers) == [0, 0], [words.read_text() for words in said]
    one = pretrain("one", "--nproc", "2")
    assert metrics(tmp_path / "run") == metrics(one) and len(metrics(one)) == 12
    assert final_bits(tmp_path / "run", 12) == final_bits(one, 12)


@pytest.fixture
def under_way(nodes, tmp_path):
    """A run of many steps on two nodes: its launchers, and files with their words."""
    launchers, said = nodes(*LONG, "checkpoint.every=5")
    run = tmp_path / "run"
    wait_until(lambda: steps_done(run) >= 8 or any(launcher.poll() is not None for launcher in launchers), "some steps")
    assert steps_done(run) >= 8, [words.read_text() for words in said]
    return launchers, said


def test_a_dead_rank_is_named_on_every_node(under_way):
    launchers, said = under_way
    victim = ranks_of(launchers[1])[0]
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert ended(launchers) == [128 + signal.SIGKILL] * 2
    assert time.monotonic() - began < 20
    for words in said:
        text = words.read_text()
        assert f"rank 1 (pid {victim} on {os.uname().nodename}) was killed by SIGKILL; ending the other ranks" in text
        assert text.count("ending the other ranks") == 1 and "Traceback" not in text
    assert f"rank 0: lost contact with another rank on {os.uname().nodename} (" in said[0].read_text()


@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_to_one_launcher_saves_and_ends_all_at_once(node, under_way, tmp_path):
    launchers, said = under_way
    began = time.monotonic()
    os.kill(launchers[node].pid, signal.SIGTERM)
    assert ended(launchers) == [0, 0], [words.read_text() for words in said]
    assert time.monotonic() - began < 20
    step = int((tmp_path / "run/checkpoints/latest").read_text().removeprefix("step_"))
    assert f"stopped by SIGTERM after step {step} of 4000, checkpoint saved" in said[0].read_text()
    assert metrics(tmp_path / "run")[-1]["step"] == step


def test_a_launcher_that_is_gone_is_said_and_the_ranks_save(under_way, tmp_path):
    launchers, said = under_way
    os.kill(launchers[1].pid, signal.SIGKILL)
    assert ended(launchers)[0] == 0
    text = said[0].read_text()
    assert "the launcher of node 1 is gone; its ranks save and end, if they can" in text
    assert "stopped: the launcher is gone after step" in text and "checkpoint saved" in text


def test_nobody_else_comes(nodes):
    launchers, said = nodes(which=[0], **{SECONDS: "1"})
    assert ended(launchers) == [1]
    assert re.search(r"^megatron-encdec: after 1 s 1 of 2 nodes have not come to 127.0.0.1:\d+: node 1$",
                     said[0].read_text(), re.MULTILINE)


def test_nobody_is_where_the_others_are_said_to_be(nodes):
    launchers, said = nodes(which=[1], master="127.0.0.9:29500", **{SECONDS: "1"})
    assert ended(launchers) == [1]
    assert re.search(r"^megatron-encdec: node 1 on .* finds nobody of its job \(.*run\) at 127.0.0.9:29500-29507: "
                     r"Connection refused, within 1 s; MASTER_ADDR has to name the host of node 0$",
                     said[0].read_text(), re.MULTILINE)


def test_other_numbers_on_another_node(nodes):
    one, _ = nodes(which=[0])
    other, said = nodes("--nproc", "3", "parallel.tensor=1", "batch.global_size=24", which=[1])
    assert ended([*one, *other]) == [2, 2]
    assert "node 1 on" in said[0].read_text() and "--nproc 3" in said[0].read_text()
    assert "Traceback" not in said[0].read_text()


def test_a_mistake_on_one_node_ends_the_other(nodes, root):
    one, said = nodes(which=[0])
    other, _ = nodes(f"data.train=[{{path: {root}/nothing}}]", which=[1])
    assert ended([*one, *other]) == [2, 2]
    assert re.search(r"^megatron-encdec: node 1 on .*nothing", said[0].read_text(), re.MULTILINE)
