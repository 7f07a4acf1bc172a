"""Saving beside training: the snapshot, the order of durability, what a failing disk or a dead rank leaves."""

import errno
import json
import os
import resource
import signal
import subprocess
import time

import pytest
import torch
from small_run import start_code
from trunk_states import fill, make, run_ranks, state_at, wrong

from megatron_encdec.engine import checkpoint, loading
from megatron_encdec.engine.integrity import verify
from megatron_encdec.engine.saver import Saver


def contents(directory):
    return {entry.name: entry.read_bytes() for entry in directory.iterdir()}


def test_the_snapshot_is_the_state_at_the_time_of_save(topology, tmp_path):
    trunk, optimizer = make(topology, hidden_size=256, ffn_hidden_size=512, vocabulary_size=5000)
    fill(trunk, optimizer)
    saver = Saver(tmp_path / "checkpoints", trunk, optimizer, keep=1)
    saver.save(state_at(3))
    changes = 0
    while not (events := saver.poll()):  # training goes on while the thread writes
        with torch.no_grad():
            for parameter in trunk.parameters():
                parameter.add_(1)
        for values in optimizer.chained_optimizers[0].optimizer.state.values():
            values["exp_avg"].zero_()
            values["step"].add_(1)
        changes += 1
    assert changes > 1 and events[0].error is None and events[0].state.step == 3
    assert events[0].seconds_blocked < events[0].seconds_total
    assert wrong(trunk, optimizer)
    loading.load(events[0].path, trunk, optimizer)
    assert wrong(trunk, optimizer) == []
    assert optimizer.chained_optimizers[0].optimizer.state_dict()["state"][0]["step"] == 7


def test_waiting_or_not_the_bytes_are_the_same(topology, tmp_path):
    trunk, optimizer = make(topology)
    fill(trunk, optimizer)
    saved = []
    for name, asynchronous in (("a", True), ("b", False), ("c", True)):
        saver = Saver(tmp_path / name, trunk, optimizer, keep=1, asynchronous=asynchronous)
        saver.save(state_at(1))
        event, = saver.wait()
        assert event.bytes == sum(map(len, contents(event.path).values()))
        saved.append(contents(event.path))
    assert saved[0] == saved[1] == saved[2]


def test_a_save_waits_for_the_one_before_it_and_events_come_in_order(topology, tmp_path):
    trunk, optimizer = make(topology)
    saver = Saver(tmp_path / "checkpoints", trunk, optimizer, keep=2)
    for step in (1, 2, 3, 4):
        saver.save(state_at(step), always={2})
    events = saver.wait()
    assert [(event.state.step, event.error, event.pruned) for event in events] == [
        (1, None, []), (2, None, []), (3, None, ["step_00000001"]), (4, None, [])]
    assert saver.wait() == [] and checkpoint.newest(tmp_path / "checkpoints").name == "step_00000004"
    assert checkpoint.saved_names(tmp_path / "checkpoints") == ["step_00000002", "step_00000003", "step_00000004"]


def test_the_same_step_again_replaces_it_and_later_leftovers_do_not_count(topology, checkpoints):
    trunk, optimizer = make(topology, seed=5)
    saver = Saver(checkpoints, trunk, optimizer, keep=1, asynchronous=False)
    before = contents(checkpoints / "step_00000001")
    saver.save(state_at(1))  # as after a resume from before step 1, while step 2 is still there
    event, = saver.poll()
    assert event.error is None and event.pruned == []
    assert checkpoint.newest(checkpoints).name == "step_00000001"
    assert contents(checkpoints / "step_00000001") != before and verify(checkpoints / "step_00000001") == []
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000001", "step_00000002"]


def failed(saver, checkpoints, reason):
    """The one event is a failure; step 2 is untouched and nothing partial is left."""
    event, = saver.wait()
    assert reason in event.error and event.state.step == 3 and event.error.count("\n") == 0
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000001", "step_00000002"]
    assert checkpoint.newest(checkpoints).name == "step_00000002" and verify(checkpoints / "step_00000002") == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk(topology, written, small_disk, asynchronous):
    checkpoints = small_disk / "checkpoints"
    trunk, optimizer = make(topology)
    saver = Saver(checkpoints, trunk, optimizer, keep=2, asynchronous=asynchronous)
    for step in (1, 2):
        saver.save(state_at(step))
    assert [event.error for event in saver.wait()] == [None, None]
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "something_else").write_bytes(b"x" * (free - 300_000))
    saver.save(state_at(3))
    failed(saver, checkpoints, os.strerror(errno.ENOSPC))
    (small_disk / "something_else").unlink()
    saver.save(state_at(4))  # there is room again: training goes on, and so does saving
    assert saver.wait()[0].error is None and checkpoint.newest(checkpoints).name == "step_00000004"


def test_a_file_that_may_grow_no_more(topology, checkpoints):
    """The kernel's own limit on file sizes, which needs no privileges."""
    trunk, optimizer = make(topology)
    saver = Saver(checkpoints, trunk, optimizer, keep=2)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        saver.save(state_at(3))
        failed(saver, checkpoints, os.strerror(errno.EFBIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_read_only_directory(topology, checkpoints):
    trunk, optimizer = make(topology)
    saver = Saver(checkpoints, trunk, optimizer, keep=2)
    if subprocess.run(["mount", "--bind", checkpoints, checkpoints], capture_output=True).returncode:
        pytest.skip("mounting needs privileges")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", checkpoints], check=True)
        saver.save(state_at(3))
        failed(saver, checkpoints, os.strerror(errno.EROFS))
    finally:
        subprocess.run(["umount", "-l", checkpoints], check=True)


def test_one_ranks_failure_reaches_all_and_the_next_save_works(checkpoints):
    told = run_ranks(2, """
        import json, resource, signal, sys
        from pathlib import Path
        from trunk_states import make, state_at
        from megatron_encdec.engine.saver import Saver
        from megatron_encdec.platform import distributed
        topology = distributed.initialize()
        saver = Saver(Path(sys.argv[1]), *make(topology), keep=5)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if topology.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        saver.save(state_at(3))
        events = saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saver.save(state_at(4))
        print(json.dumps([[event.state.step, event.error, event.bytes] for event in events + saver.wait()]))
        distributed.shutdown()
    """, checkpoints)
    assert told[0] == told[1]
    (step, error, _), after = json.loads(told[0])
    assert step == 3 and error == f"rank 1: {os.strerror(errno.EFBIG)}"
    assert after[:2] == [4, None]
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000001", "step_00000002", "step_00000004"]
    assert verify(checkpoints / "step_00000004") == []


def test_a_rank_that_dies_fails_the_save_of_the_others(checkpoints):
    told = run_ranks(2, """
        import os, signal, sys, time
        from pathlib import Path
        from trunk_states import make, state_at
        from megatron_encdec.engine.saver import Saver
        from megatron_encdec.platform import distributed
        topology = distributed.initialize()
        saver = Saver(Path(sys.argv[1]), *make(topology), keep=5, write_timeout=20)
        if topology.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        saver.save(state_at(3))
        print(saver.wait()[0].error, flush=True)
        os._exit(0)
    """, checkpoints, check=False)
    assert told[0].startswith("rank 0: ") and told[1] == ""
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000001", "step_00000002"]


def test_killed_while_writing_leaves_the_last_good_one(topology, checkpoints, tmp_path):
    code = """
        import os, sys, time
        from pathlib import Path
        from trunk_states import make, state_at
        from megatron_encdec.engine.saver import Saver
        from megatron_encdec.platform import distributed
        trunk, optimizer = make(distributed.initialize(), hidden_size=256, ffn_hidden_size=512,
                                vocabulary_size=20000)
        os.fsync = lambda descriptor: time.sleep(600)  # a disk that never answers: it is killed in the middle
        saver = Saver(Path(sys.argv[1]), trunk, optimizer, keep=5, asynchronous=False)
        saver.save(state_at(3))
    """
    victim = start_code(code, checkpoints, output=tmp_path / "said")
    partial = checkpoints / ".step_00000003.tmp" / "__0_0.distcp"
    while not (partial.exists() and partial.stat().st_size > 1_000_000):
        assert victim.poll() is None
        time.sleep(0.002)
    victim.kill()
    victim.wait()
    assert partial.exists() and checkpoint.newest(checkpoints).name == "step_00000002"
    Saver(checkpoints, *make(topology), keep=5)
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000001", "step_00000002"]
