"""Two launches on one run directory: real processes, killed for real, one file."""

import json
import os
import signal
import subprocess
import sys

import pytest

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir import lock as lock_module
from megatron_encdec.rundir.lock import FolderLock, Holder

HOLD = """
import sys, time
from pathlib import Path
from megatron_encdec.rundir.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def refuse_flock(monkeypatch):
    """A file system without flock: the call itself answers so."""
    def unsupported(_descriptor, _operation):
        raise OSError(lock_module.errno.ENOLCK, "No locks available")
    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)


@pytest.mark.parametrize("flock", [True, False])
def test_the_second_launch_is_told_who_holds_it(tmp_path, holder, flock, monkeypatch):
    if not flock:
        refuse_flock(monkeypatch)
    with pytest.raises(UserError) as refused, FolderLock(tmp_path / "run"):
        pass
    assert f"pid {holder.pid} on {Holder.this_process().host}" in str(refused.value)
    assert "another run.dir" in str(refused.value)


@pytest.mark.parametrize("flock", [True, False])
def test_a_killed_holder_leaves_nothing_that_matters(tmp_path, holder, flock, monkeypatch):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    if not flock:
        refuse_flock(monkeypatch)
    with FolderLock(tmp_path / "run") as lock:
        assert f"pid {holder.pid}" in lock.note
    with FolderLock(tmp_path / "run") as lock:  # let go of properly this time
        assert lock.note is None


def test_without_flock_a_reused_pid_another_boot_and_another_host_are_told_apart(tmp_path, monkeypatch):
    refuse_flock(monkeypatch)
    ours = Holder.this_process()

    def held_by(**changes):
        (tmp_path / "run.lock").write_text(json.dumps({**vars(ours), **changes}))
        return FolderLock(tmp_path)

    with pytest.raises(UserError, match=f"pid {os.getpid()} "), held_by():
        pass
    with held_by(started=ours.started - 1) as lock:
        assert lock.note
    with held_by(boot="another") as lock:
        assert lock.note
    with pytest.raises(UserError, match="on elsewhere .*if it runs no more, delete .*run.lock"), \
            held_by(host="elsewhere", boot="another"):
        pass


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
