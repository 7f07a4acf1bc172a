"""Two launches on one run directory: real processes, killed and stopped for real, one file.

A process "elsewhere" is one that believes so: its host name is another. What its file system's flock does is said by
FLOCK: it reaches all hosts, it reaches no other host (every host gets it), or there is none.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from small_run import wait_until

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir import lock as lock_module
from megatron_encdec.rundir.lock import FolderLock, Holder, InUse

STILL = 1.0
SCRIPT = """
import errno, os, sys, time
from megatron_encdec.rundir import lock
from megatron_encdec.rundir.lock import FolderLock, InUse
lock.BEAT_SECONDS, os.environ[lock.SECONDS], lock._LOOK_SECONDS = 0.1, "{still}", 0.02
if host := os.environ.get("HOST"):
    lock.socket.gethostname = lambda: host
if os.environ.get("FLOCK") == "local":
    lock.fcntl.flock = lambda descriptor, operation: None
if os.environ.get("FLOCK") == "none":
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    lock.fcntl.flock = unsupported
""".replace("{still}", str(STILL))
HOLD = SCRIPT + """
try:
    with FolderLock(sys.argv[1]) as held:
        print("held", flush=True)
        while not held.claim.lost():
            time.sleep(0.02)
        held.claim.check()
except InUse as error:
    print(error, flush=True)
"""
COUNT = SCRIPT + """
from pathlib import Path
for _ in range(10):
    with FolderLock(sys.argv[1], patience=60.0):
        path = Path(sys.argv[1], "count")
        path.write_text(str(int(path.read_text() or 0) + 1))
"""


@contextlib.contextmanager
def holding(folder, **environment):
    """A process that holds `folder`, until it has lost it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, **environment})
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def holder(tmp_path):
    """A process of this host that holds tmp_path / "run"."""
    with holding(tmp_path / "run") as process:
        yield process


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """This process waits for no more than STILL seconds."""
    monkeypatch.setenv(lock_module.SECONDS, str(STILL))
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock_module, "_LOOK_SECONDS", 0.05)


def flock(monkeypatch, how):
    """What this process's file system answers."""
    def unsupported(_descriptor, _operation):
        raise OSError(lock_module.errno.ENOLCK, "No locks available")
    if how != "shared":
        monkeypatch.setattr(lock_module.fcntl, "flock", unsupported if how == "none" else lambda *_: None)


def held_by(folder, **changes):
    """Have the lock file say that this process holds the folder, but for `changes`."""
    folder.mkdir(exist_ok=True)
    (folder / "run.lock").write_text(json.dumps(vars(replace(Holder.this_process(), **changes))))


def seconds_to_take(folder, **options):
    began = time.monotonic()
    with FolderLock(folder, **options) as lock:
        return time.monotonic() - began, lock.note


@pytest.mark.parametrize("how", ["shared", "none"])
def test_the_second_launch_is_told_who_holds_it(tmp_path, holder, how, monkeypatch):
    flock(monkeypatch, how)
    began = time.monotonic()
    with pytest.raises(UserError) as refused, FolderLock(tmp_path / "run"):
        pass
    assert f"pid {holder.pid} on {Holder.this_process().host}" in str(refused.value)
    assert "another run.dir" in str(refused.value) and time.monotonic() - began < STILL


@pytest.mark.parametrize("how", ["shared", "none"])
def test_a_killed_holder_of_this_host_leaves_nothing_that_matters(tmp_path, holder, how, monkeypatch):
    holder.kill()
    holder.wait()
    flock(monkeypatch, how)
    seconds, note = seconds_to_take(tmp_path / "run")
    assert f"pid {holder.pid}" in note and seconds < STILL
    assert seconds_to_take(tmp_path / "run")[1] is None  # let go of properly this time


@pytest.mark.parametrize("how", ["shared", "local", "none"])
def test_a_holder_elsewhere_that_lives_is_left_alone_whatever_flock_says(tmp_path, how, monkeypatch, capfd):
    """Also where flock reaches this host alone: the fault of taking over a live launch's lock."""
    flock(monkeypatch, how)
    with holding(tmp_path / "run", HOST="elsewhere", FLOCK=how) as process:
        with pytest.raises(InUse, match=f"in use by pid {process.pid} on elsewhere"), FolderLock(tmp_path / "run"):
            pass
        assert process.poll() is None
    assert f"run is held by pid {process.pid} on elsewhere" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["shared", "local", "none"])
def test_a_holder_elsewhere_that_has_died_is_waited_for(tmp_path, how, monkeypatch, capfd):
    """Its server may keep its flock: that of a host without power."""
    with holding(tmp_path / "run", HOST="elsewhere", FLOCK=how) as process:
        process.kill()
        process.wait()
    with open(tmp_path / "run" / "run.lock") as server:
        fcntl.flock(server, fcntl.LOCK_EX)
        flock(monkeypatch, how)
        seconds, note = seconds_to_take(tmp_path / "run")
    assert STILL <= seconds < STILL + 10 and f"pid {process.pid} on elsewhere" in note and "stood still" in note
    assert "taken over if that stands still" in capfd.readouterr().err


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"boot": "another"}, {"pids": "pid:[1]"}, {"pids": ""}])
def test_only_a_process_of_this_kernel_and_namespace_is_judged_by_its_pid(tmp_path, changes):
    """A container of this host with this host's name, and pids of its own, may well be alive."""
    held_by(tmp_path, started=1, **changes)
    assert seconds_to_take(tmp_path)[0] >= STILL
    held_by(tmp_path, started=1)
    assert seconds_to_take(tmp_path)[0] < STILL


def test_a_reused_pid_is_told_apart(tmp_path, monkeypatch):
    flock(monkeypatch, "none")
    held_by(tmp_path)
    with pytest.raises(InUse, match=f"pid {os.getpid()} "), FolderLock(tmp_path):
        pass
    held_by(tmp_path, started=Holder.this_process().started - 1)
    assert seconds_to_take(tmp_path)[1]


def test_a_holder_that_stood_still_too_long_stops_when_it_wakes_up(tmp_path, monkeypatch):
    """And it neither beats over the new holder's name nor takes it away at its end."""
    flock(monkeypatch, "local")
    with holding(tmp_path / "run", HOST="elsewhere", FLOCK="local") as process:
        process.send_signal(signal.SIGSTOP)
        with FolderLock(tmp_path / "run") as lock:
            process.send_signal(signal.SIGCONT)
            said, _ = process.communicate(timeout=60)
            assert f"is now held by pid {os.getpid()} on {Holder.this_process().host}" in said
            assert lock.claim.lost() is None
            with pytest.raises(InUse), FolderLock(tmp_path / "run"):
                pass


def test_a_requeued_job_waits_for_its_earlier_life_however_long_that_lives(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with holding(tmp_path / "run", SLURM_RESTART_COUNT="2"), pytest.raises(InUse), FolderLock(tmp_path / "run"):
        pass
    for host in ("", "elsewhere"):
        with holding(tmp_path / "run", HOST=host, SLURM_RESTART_COUNT="1") as process:
            subprocess.Popen(["sh", "-c", f"sleep {2 * STILL}; kill -KILL {process.pid}"])
            assert seconds_to_take(tmp_path / "run")[0] >= 2 * STILL
            assert "this job's earlier life; waiting for its end" in capfd.readouterr().err


def test_waiting_ends_when_asked_to(tmp_path):
    held_by(tmp_path, host="elsewhere")
    began = time.monotonic()
    with pytest.raises(InUse), FolderLock(tmp_path, stop=lambda: time.monotonic() > began + 0.3):
        pass
    assert time.monotonic() - began < STILL


def test_without_patience_looks_add_up(tmp_path):
    """As a sweep does that has other runs to do meanwhile."""
    held_by(tmp_path, host="elsewhere")
    began, looks = time.monotonic(), 0
    while True:
        with contextlib.suppress(InUse), FolderLock(tmp_path, patience=None):
            break
        looks += 1
        time.sleep(0.1)
    assert looks > 3 and time.monotonic() - began >= STILL


def test_a_lock_that_was_deleted_or_emptied_is_lost(tmp_path):
    for spoil in (lambda path: path.unlink(), lambda path: path.write_text("")):
        with FolderLock(tmp_path) as lock:
            lock.claim.check()
            spoil(tmp_path / "run.lock")
            with pytest.raises(InUse, match=r"run\.lock: is (not there any more|now held by nobody)"):
                lock.claim.check()


def test_every_reader_sees_a_whole_name_at_every_heartbeat(tmp_path, monkeypatch):
    """Also where a longer text stood before, and where the number gets longer."""
    held_by(tmp_path, started=1, command="x" * 3000)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.0)
    with FolderLock(tmp_path) as lock:
        beats = set()
        while not beats or max(beats) < 120:
            assert lock.claim.lost() is None
            beats.add(json.loads((tmp_path / "run.lock").read_bytes())["beat"])
    assert len(beats) > 20 and (tmp_path / "run.lock").read_bytes() == b""


@pytest.mark.parametrize("how", ["shared", "local", "none"])
def test_of_many_that_take_over_a_dead_lock_one_holds_it(tmp_path, how):
    (tmp_path / "run").mkdir()
    held_by(tmp_path / "run", host="gone")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, "HOST": f"node{number}", "FLOCK": how}) for number in range(3)]
    try:
        wait_until(lambda: sum(process.poll() is None for process in processes) == 1, "all but one to give up")
        time.sleep(0.5)
        alive = [process for process in processes if process.poll() is None]
        assert json.loads((tmp_path / "run" / "run.lock").read_bytes())["pid"] == alive[0].pid
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_with_patience_everyone_has_a_turn(tmp_path):
    (tmp_path / "count").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "40"


def test_an_unreadable_lock_file_is_no_obstacle(tmp_path):
    (tmp_path / "run.lock").write_text("{half")
    with FolderLock(tmp_path) as lock:
        assert lock.note is None


def test_a_read_only_directory_is_a_clear_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run.dir: .*file cannot be written to"), FolderLock(tmp_path / "file"):
        pass
    if os.path.isdir("/proc/sys"):
        with pytest.raises(UserError, match="run.dir: /proc/run cannot be written to"), FolderLock("/proc/run"):
            pass


@pytest.mark.parametrize("text", ["soon", "inf", "nan", "0.2"])
def test_a_time_to_wait_that_is_none_is_refused_before_it_matters(tmp_path, monkeypatch, text):
    monkeypatch.setenv(lock_module.SECONDS, text)
    with pytest.raises(UserError, match=f"{lock_module.SECONDS}: '{text}' is not a number of seconds of at least 0.3"):
        FolderLock(tmp_path / "run")
