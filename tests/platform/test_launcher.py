"""Which rank is named when several end; what is started where, by the command line and by srun's numbers."""

import multiprocessing
import os
import signal
import time

import pytest

from megatron_encdec.platform import errors, launcher
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.launcher import Nodes, check_srun, read_nodes
from megatron_encdec.platform.meeting import Met
from megatron_encdec.platform.signals import StopSignals


def _ends(how: int | None, after_another: bool, another_ends) -> None:
    """With exit code `how` (None: never), or by signal -`how`; `another_ends`: an event that the first one sets."""
    if how is None:
        time.sleep(600)
    if after_another:
        another_ends.wait()
    another_ends.set()
    if how < 0:
        os.kill(os.getpid(), -how)
    os._exit(how)


@pytest.mark.parametrize(("ends", "code", "said"), [
    ([(1, False), (-9, True)], 137, "rank 1 (pid {1}) was killed by SIGKILL"),  # it took the other one with it
    ([(-9, True), (1, False)], 137, "rank 0 (pid {0}) was killed by SIGKILL"),
    ([(1, True), (0, False)], 1, "rank 0 (pid {0}) ended with exit code 1"),
    ([(0, False), (2, False)], 2, ""),
    ([(0, False), (0, False)], 0, ""),
    ([(85, False), (85, True)], 85, ""),  # stopped, in good order
    ([(85, False), (1, True)], 1, "rank 1 (pid {1}) ended with exit code 1"),
    ([(None, False), (1, False)], 1, "rank 1 (pid {1}) ended with exit code 1"),  # rank 0 is ended
    ([(launcher.LOST_CONTACT, False), (3, True)], 3, "rank 1 (pid {1}) ended with exit code 3"),  # which rank 0 missed
    ([(launcher.LOST_CONTACT, False), (0, True)], 1, "rank 0 (pid {0}) lost contact with another rank"),
])
def test_the_rank_that_began_it_is_named(ends, code, said, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    if (None, False) not in ends:  # so that the second one is there before the first is named, however busy the machine
        monkeypatch.setattr(launcher, "SETTLE_SECONDS", 300)
    monkeypatch.setattr(errors, "_stopped_code", 85)
    context = multiprocessing.get_context("spawn")
    first = context.Event()
    processes = [context.Process(target=_ends, args=(*arguments, first)) for arguments in ends]
    for process in processes:
        process.start()
    with StopSignals(launcher.FORWARDED) as signals:
        assert launcher._wait(processes, signals, launcher._Crew(Nodes(2), Met())) == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    err = capsys.readouterr().err
    assert said.format(*(process.pid for process in processes)) in err
    assert err.count("ending the other ranks") == bool(said)


def srun(monkeypatch, tasks_of_node: str, node: int, **more: str) -> None:
    """As a task of a step that has so many tasks a node sees it."""
    values = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NODEID": str(node),
              "SLURM_STEP_TASKS_PER_NODE": tasks_of_node, "SLURM_PROCID": str(node), "SLURM_LOCALID": "0", **more}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def read(*arguments, gpus: int = 0) -> Nodes | None:
    return read_nodes(*arguments, *[None] * (4 - len(arguments)), lambda: gpus)


@pytest.mark.parametrize(("tasks", "tasks_of_node", "nproc", "gpus", "ranks"), [
    ("2", "1(x2)", 4, 0, 4),  # a task a node, told how many ranks to start
    ("2", "1(x2)", None, 8, 8),  # or all the GPUs it sees
    ("2", "1(x2)", None, 1, None),  # a task a rank
    ("2", "1(x2)", None, 0, None),
    ("4", "2(x2)", None, 0, None),
    ("4", "2(x2)", 2, 0, None),
    ("16", "8(x2)", None, 8, None),  # a task a GPU, all to be seen
    ("16", "8(x2)", None, 1, None),  # or one
    ("3", "2,1", None, 0, None),
])
def test_what_a_task_of_srun_is(tasks, tasks_of_node, nproc, gpus, ranks, monkeypatch):
    srun(monkeypatch, tasks_of_node, 1, SLURM_STEP_NUM_TASKS=tasks)
    nodes = read(nproc, gpus=gpus)
    assert (nodes and (nodes.ranks, nodes.count, nodes.node, nodes.address, nodes.job)) == (
        ranks and (ranks, 2, 1, "node1", "Slurm 12.0.0"))


@pytest.mark.parametrize(("tasks", "tasks_of_node", "arguments", "gpus", "said"), [
    ("4", "2(x2)", (4,), 0, "--nproc 4: srun has started 4 tasks on 2 nodes (2 a node)"),
    ("4", "2(x2)", (None,), 4, "srun has started 4 tasks on 2 nodes (2 a node), and a task sees 4 GPUs"),
    ("3", "2,1", (None,), 2, "3 tasks on 2 nodes (1, 2 a node), and a task sees 2 GPUs"),
    ("2", "1(x2)", (4, 3), 0, "--nnodes 3: srun has started 2 tasks on 2 nodes"),
])
def test_other_numbers_of_srun_are_refused(tasks, tasks_of_node, arguments, gpus, said, monkeypatch):
    srun(monkeypatch, tasks_of_node, 0, SLURM_STEP_NUM_TASKS=tasks)
    with pytest.raises(UserError) as error:
        read(*arguments, gpus=gpus)
    assert said in str(error.value)


def test_what_is_started_by_hand(monkeypatch):
    assert read() is None and read(1) is None and read(4) == Nodes(4)
    assert read(None, 1) is None and read(None, 1, gpus=8) == Nodes(8)
    assert read(None, 2, 1, "head") == Nodes(1, 2, 1, "head", 29500)
    assert read(4, 2, 1, "head:31000") == Nodes(4, 2, 1, "head", 31000)
    assert read(4, 2, 1, "[fe80::1]:31000") == Nodes(4, 2, 1, "fe80::1", 31000)
    assert read(4, 2, 1, "fe80::1") == Nodes(4, 2, 1, "fe80::1", 29500)
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "31000"}.items():
        monkeypatch.setenv(name, value)
    assert read(4, 2) == Nodes(4, 2, 1, "head", 31000) and read(4, 2, 0, "h:1") == Nodes(4, 2, 0, "h", 1)


@pytest.mark.parametrize(("arguments", "said"), [
    ((0,), "--nproc 0: at least one rank"), ((1, 0), "--nnodes 0"),
    ((1, 2, None, "head"), "--node-rank (or NODE_RANK)"), ((1, 2, 2, "head"), "from 0 to 1"),
    ((1, 2, 0), "--master ADDRESS"), ((1, 2, 0, "head:x"), "--master head:x"),
])
def test_a_mistake_in_them_is_refused(arguments, said):
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert said in str(error.value)


def test_one_launcher_is_enough(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert read() is None
    with pytest.raises(UserError, match="rank 1 of 2 of torchrun"):
        read(2)


def test_a_batch_script_without_srun_is_told(monkeypatch):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(name, value)
    assert check_srun(2, None) is check_srun(None, 1) is None
    with pytest.raises(UserError, match="SLURM_NTASKS=2, but this is no step of that job: put srun before"):
        check_srun(None, None)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(UserError, match="SLURM_JOB_NUM_NODES=2, but"):
        check_srun(2, None)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert check_srun(None, None) is None
