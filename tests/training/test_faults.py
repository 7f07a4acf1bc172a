"""Dead and hung ranks, two launches, full and read-only disks, damaged checkpoints: each made for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small_run import (
    PATIENCE,
    final_bits,
    metrics,
    ranks_of,
    run_cli,
    start_cli,
    start_code,
    steps_done,
    take_over,
    wait_until,
)

LONG = ("phases.0.steps=2000", "phases.1.steps=2000", "checkpoint.every=5")


@pytest.fixture
def begin(root, tmp_path):
    """A function: a run of many steps on two ranks, under way; (launcher, run directory, file with its output)."""
    started = []

    def call(*arguments, steps=8, code=None):
        run, output = tmp_path / "run", tmp_path / "output"
        command = ("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, "--nproc", "2", *arguments)
        process = start_code(code, *command, output=output) if code else start_cli(*command, output=output)
        started.append(process)
        wait_until(lambda: steps_done(run) >= steps and (run / "checkpoints/latest").exists()
                   or process.poll() is not None, "the first steps and a checkpoint")
        assert process.poll() is None, output.read_text()
        return process, run, output

    yield call
    for process in started:
        for pid in [*(ranks_of(process) if process.poll() is None else []), process.pid]:
            with_no_such_process(pid, signal.SIGKILL)


def with_no_such_process(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def newest(run) -> int:
    return int((run / "checkpoints/latest").read_text().removeprefix("step_"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_is_named_and_the_resume_is_exact(victim, begin, root, tmp_path):
    process, run, output = begin()
    ranks = ranks_of(process)
    os.kill(ranks[victim], signal.SIGKILL)
    assert process.wait(PATIENCE) == 128 + signal.SIGKILL
    said = output.read_text()
    assert f"rank {victim} (pid {ranks[victim]}) was killed by SIGKILL; ending the other ranks" in said
    assert f"rank {1 - victim}: lost contact with another rank" in said and "Traceback" not in said
    step = newest(run) + 3
    again = ("--nproc", "2", "--until", step)
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, *again)
    run_cli("pretrain", root / "config.yaml", f"run.dir={tmp_path / 'whole'}", *LONG, *again)
    assert metrics(run) == metrics(tmp_path / "whole") and final_bits(run, step) == final_bits(tmp_path / "whole", step)
    saved = [line["step"] for line in lines_of(run) if line["kind"] == "checkpoint"]
    assert saved == sorted(set(saved)) and saved[-1] == step  # one line each, the one that the kill held back too


@pytest.mark.parametrize("victim", [0, 1])
def test_a_hung_rank_is_named(victim, begin):
    process, run, output = begin("run.hang_timeout=5")
    hung = ranks_of(process)[victim]
    os.kill(hung, signal.SIGSTOP)
    stopped = time.monotonic()
    assert process.wait(PATIENCE) == 1
    assert time.monotonic() - stopped > 5
    said = output.read_text()
    assert f"rank {victim} (pid {hung} on {os.uname().nodename}) hangs: no sign of life for" in said
    assert "run.hang_timeout=5 s" in said and "last at: " in said
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)


def test_a_rank_that_reads_forever_is_named_although_it_beats(begin, root, tmp_path):
    """Its main thread waits for a pipe that nobody writes to, as for a file system that does not answer."""
    slow = tmp_path / "slow"
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{root / 'text'}{suffix}", f"{slow}{suffix}")
    code = f"""
import os, sys
from megatron_encdec.data import store
from megatron_encdec.cli import main
read = store.TokenStore.read
def hangs(self, start, length):
    if os.environ.get("RANK") == "1" and os.path.exists({str(tmp_path / 'now')!r}):
        open({str(tmp_path / 'pipe')!r}).read()
    return read(self, start, length)
store.TokenStore.read = hangs
raise SystemExit(main(sys.argv[1:]))
"""
    os.mkfifo(tmp_path / "pipe")
    run, output = tmp_path / "run", tmp_path / "output"
    process = start_code(code, "pretrain", root / "config.yaml", f"run.dir={run}", *LONG, "--nproc", "2",
                         f"data.train=[{{path: {slow}}}]", "run.hang_timeout=5", output=output)
    wait_until(lambda: steps_done(run) >= 3 or process.poll() is not None, "the first steps")
    (tmp_path / "now").touch()
    assert process.wait(PATIENCE) == 1
    assert "nothing has moved for" in output.read_text() and "rank 1 (pid" in output.read_text()
    assert "hangs at: reading samples" in output.read_text() and "the others wait for it" in output.read_text()


def test_a_second_launch_on_the_directory_is_refused_and_harmless(begin, root):
    process, run, output = begin()
    second = run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, "--nproc", "2", check=False)
    assert second.returncode == 2 and "Traceback" not in second.stderr
    assert f"is in use by pid {ranks_of(process)[0]} on {os.uname().nodename}" in second.stderr
    assert second.stderr.count("\n") == 1
    steps = steps_done(run)
    wait_until(lambda: steps_done(run) > steps, "the first launch going on")
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGKILL)
    process.wait(PATIENCE)
    third = run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, "--until", newest(run) + 1)
    assert "took over the lock of a launch that ended without letting go" in third.stdout
    assert [line["step"] for line in metrics(run)] == list(range(1, len(metrics(run)) + 1))


SLOW_TO_CLOSE = """
import os, sys, time
from megatron_encdec.cli import main
from megatron_encdec.training.report import Report
close = Report.close
def slow(self):
    time.sleep(60 if os.environ["RANK"] == "0" else 0)
    close(self)
Report.close = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("code", [None, SLOW_TO_CLOSE], ids=["", "on a slow disk"])
def test_a_launch_whose_directory_was_taken_over_writes_nothing_more(code, begin):
    """As after a host that stood still for a minute, when another one has gone on with the run. Rank 0 says so before
    it tidies up, which on a slow disk takes longer than the others are given."""
    process, run, output = begin(code=code)
    take_over(run)
    before = (run / "metrics.jsonl").read_bytes(), sorted(path.name for path in (run / "checkpoints").iterdir())
    assert process.wait(PATIENCE) == 1
    said = output.read_text()
    assert said.count(f"megatron-encdec: {run}/run.lock: is now held by pid {os.getpid()} on elsewhere") == 1
    assert "Traceback" not in said and "FAILED" not in said and "elsewhere" in (run / "run.lock").read_text()
    more = (run / "metrics.jsonl").read_bytes().removeprefix(before[0])
    assert more.count(b"\n") <= 2  # what was on its way
    assert (run / "checkpoints/latest").read_text().strip() in before[1]


PATIENT = """
import os, sys
from megatron_encdec.rundir import lock
lock.BEAT_SECONDS, os.environ[lock.SECONDS] = 1.0, sys.argv[1]
from megatron_encdec.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_requeue_waits_for_the_lock_of_a_host_that_is_gone(root, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-c", PATIENT, "3", "pretrain", root / "config.yaml", f"run.dir={run}", "--until", "2"]
    take_over(run)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    assert "on elsewhere" in ended.stderr and "taken over if that stands still for 3 s" in ended.stderr
    assert "its heartbeat stood still for 3 s" in ended.stdout and len(metrics(run)) == 2
    take_over(run)
    command[3] = "300"
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "on elsewhere" in waiting.stderr.readline()
    waiting.send_signal(signal.SIGTERM)
    assert "nothing was to be saved" in waiting.communicate(timeout=PATIENCE)[0] and waiting.returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB: some five checkpoints of the test's trunk."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def test_starting_on_a_full_disk_is_one_clear_line(small_disk, here):
    run = small_disk / "run"
    here("x", f"run.dir={run}", "--until", "6")
    before = (run / "metrics.jsonl").read_bytes()
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        with_full_disk(filler)
    error = here("x", f"run.dir={run}", code=2).err
    assert "run.dir: " in error and "No space left on device" in error and error.count("\n") == 1
    assert newest(run) == 6 and (run / "metrics.jsonl").read_bytes() == before
    (small_disk / "filler").unlink()
    here("x", f"run.dir={run}")
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))


def test_a_disk_that_fills_up_and_empties_again_loses_no_line(small_disk, root, tmp_path, here):
    """Training under way; the disk is full while checkpoints are due, then has room again."""
    run, output = small_disk / "run", tmp_path / "output"
    process = start_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, output=output)
    wait_until(lambda: (run / "checkpoints/latest").exists(), "a checkpoint")
    filler = open(small_disk / "filler", "wb", buffering=0)  # noqa: SIM115
    try:
        while "CHECKPOINT FAILED" not in output.read_text():
            with_full_disk(filler)
            assert process.poll() is None, output.read_text()
            time.sleep(0.001)
    finally:
        filler.close()
    good = newest(run)
    (small_disk / "filler").unlink()
    wait_until(lambda: newest(run) > good, "a checkpoint after there is room again")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0, output.read_text()
    said = output.read_text()
    assert "No space left on device" in said and "the last good one is kept, training goes on" in said
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, newest(run) + 1))
    failed = [line for line in lines_of(run) if line["kind"] == "checkpoint" and "error" in line]
    assert failed and "No space left" in failed[0]["error"]


def with_full_disk(filler) -> None:
    """Write until nothing more goes in."""
    try:
        while filler.write(b"x" * 4096):
            pass
    except OSError:
        pass


def test_a_read_only_directory_is_one_clear_line(root, tmp_path, here):
    directory = tmp_path / "mounted"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", directory], capture_output=True).returncode:
        pytest.skip("mounting needs privileges")
    try:
        error = here("x", f"run.dir={directory / 'run'}", code=2).err
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
    assert f"run.dir: {directory / 'run'} cannot be written to (Read-only file system)" in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def saved_at_eight(root, tmp_path_factory):
    run = tmp_path_factory.mktemp("eight") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", "--until", "8", "checkpoint.every=3")
    return run


@pytest.fixture
def eight(saved_at_eight, tmp_path):
    """A run stopped after step 8; of its checkpoints 3 was pruned, 6 (a boundary) and 8 are there."""
    return shutil.copytree(saved_at_eight, tmp_path / "run")


def damage(path):
    """Flip one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", [
    "__0_0.distcp", ".metadata", "common.pt", "run_state.json", "checksums.json", "latest"])
def test_a_damaged_checkpoint_is_named_and_fallback_goes_on_from_the_one_before(file, here, unbroken, eight):
    run = eight
    victim = run / "checkpoints" / ("latest" if file == "latest" else f"step_00000008/{file}")
    damage(victim)
    left = 8 if file == "latest" else 6
    refused = here("run", code=2)
    assert victim.name in refused.err and f"step_0000000{left}: use it with --fallback" in refused.err
    assert metrics(run)[-1]["step"] == 8 and refused.err.count("\n") == 1
    gone_on = here("run", "--fallback")
    assert f"step_0000000{left} instead" in gone_on.out
    resume = [line for line in lines_of(run) if line["kind"] == "resume"][-1]
    assert resume["step"] == left and resume["fallback"]["used"] == f"step_0000000{left}"
    assert victim.name in resume["fallback"]["problems"][0]
    assert metrics(run) == metrics(unbroken) and final_bits(run, 12) == final_bits(unbroken, 12)
    assert "nothing is left" in here("run", "--fallback").out  # an intact checkpoint is simply used


def test_no_intact_checkpoint_is_said(here):
    run = here("run", "--until", "3").run
    damage(run / "checkpoints/step_00000003/common.pt")
    assert "there is no intact one beside it" in here("run", code=2).err
    assert "there is no intact checkpoint in" in here("run", "--fallback", code=2).err


def test_two_ranks_fall_back_together(root, eight):
    run = eight
    damage(run / "checkpoints/step_00000008/__0_0.distcp")
    arguments = ("pretrain", root / "config.yaml", f"run.dir={run}", "--nproc", "2")
    refused = run_cli(*arguments, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--fallback" in refused.stderr
    run_cli(*arguments, "--fallback")
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))
