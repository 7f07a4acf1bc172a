"""Runs that are killed, at random and at each step of the finish, and started again by the same command."""

import contextlib
import functools
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_run import take_over, wait_until

from megatron_encdec.cli import main
from megatron_encdec.text import chunks, preprocess
from megatron_encdec.text import manifest as manifests

# The command with chunks of a few kB. With KILL=n the process kills itself before its n-th renaming or removing of
# a file that is not a chunk's: that is how a run begins and, above all, how it ends. With HOLD=FILE it waits, once five
# chunks or more are finished, for as long as FILE is there.
SCRIPT = """
import os, signal, sys
from megatron_encdec.platform.signals import interrupts_end_the_process
print("begun", flush=True)
with interrupts_end_the_process():
    from megatron_encdec.text import chunks, preprocess
chunks.CHUNK_BYTES = preprocess.CHUNK_BYTES = int(os.environ.get("CHUNK", 4096))
left = [int(os.environ.get("KILL", 0))]
def watch(event, arguments):
    if event in ("os.rename", "os.remove", "shutil.rmtree") and "out" in str(arguments[0]):
        if not os.path.basename(str(arguments[0])).startswith(("ids-", "block-")):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
if left[0]:
    sys.addaudithook(watch)
if held := os.environ.get("HOLD"):
    import time
    from megatron_encdec.text.partial import PartialRun
    record = PartialRun.record
    def record_and_wait(self, account):
        record(self, account)
        if len(self.finished_chunks()) >= 5:
            open(held + ".reached", "w").close()
            while os.path.exists(held):
                time.sleep(0.01)
    PartialRun.record = record_and_wait
from megatron_encdec.cli import main
sys.exit(main(["preprocess", *sys.argv[1:]]))
"""


def start(*arguments, **environment):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)], stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE, env={**os.environ, **environment}, start_new_session=True)


def run(*arguments, **environment):
    process = start(*arguments, **environment)
    output, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@contextlib.contextmanager
def held(*arguments):
    """The command, with five chunks or more finished, waiting; it goes on when the context ends, if it still runs."""
    with tempfile.NamedTemporaryFile() as hold:
        process = start(*arguments, HOLD=hold.name)
        try:
            wait_until(lambda: os.path.exists(f"{hold.name}.reached") or process.poll() is not None, "five chunks")
            assert process.poll() is None, process.communicate()
            yield process
        finally:
            Path(f"{hold.name}.reached").unlink(missing_ok=True)


def outputs(folder, name="out"):
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and path.name.startswith(f"{name}.")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 400 kB in every format, with a bad document in each hundred."""
    folder = tmp_path_factory.mktemp("input")
    draw = random.Random(5)
    texts = [" ".join(draw.choices(["mask", "encoder", "naïve", "東京", "😀", "42"], k=draw.randint(1, 80)))
             for _ in range(2400)]
    rows = [json.dumps({"text": text}) if place % 100 else "{" for place, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(rows[:800]) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[800:1600]))
    for place in range(1600, 1650):
        (folder / f"c{place}.txt").write_text(texts[place])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[1650:2000]}), folder / "d.parquet", row_group_size=20)
    (folder / "e.jsonl").write_text("\r\n".join(rows[2000:]))
    return folder


@pytest.fixture(scope="module")
def job_of(corpus, tokenizer_dir, tmp_path_factory):
    """job_of(per cent of validation) -> (arguments but for the output, what an unbroken run writes, its seconds)."""
    @functools.cache
    def make(percent):
        folder = tmp_path_factory.mktemp("whole")
        arguments = ["--input", corpus, "--tokenizer", tokenizer_dir, "--validation-percent", percent]
        began = time.monotonic()
        assert run(*arguments, "--workers", 2, "--output", folder / "out").returncode == 0
        seconds = time.monotonic() - began
        expected = outputs(folder)
        assert len(expected) == (6 if percent else 3)
        assert not (folder / "out.partial").exists()
        return arguments, expected, seconds
    return make


@pytest.fixture(params=[0, 20], ids=["one split", "validation"])
def job(request, job_of):
    """That of one split, and of two."""
    return job_of(request.param)


def test_any_number_of_workers_and_any_size_of_chunks_write_the_same(job, tmp_path):
    arguments, expected, _ = job
    for workers, size in ((1, 4096), (3, 4096), (2, 1 << 20)):
        result = run(*arguments, "--workers", workers, "--output", tmp_path / "out", CHUNK=str(size))
        assert (result.returncode, outputs(tmp_path)) == (0, expected)
        for path in tmp_path.iterdir():
            path.unlink()


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def test_twenty_kills_leave_no_trace_in_the_output(job, tmp_path):
    """Ten for each split: of the command, and every third of a worker; each goes on where the last one was."""
    arguments, expected, seconds = job
    command = [*arguments, "--workers", 2, "--output", tmp_path / "out"]
    draw, continued, kills = random.Random(len(expected)), 0, 0
    while kills < 10:
        before, process = finished(tmp_path / "out.partial"), start(*command)
        if kills % 2:
            time.sleep(draw.uniform(0.1, 1.0) * seconds)
        else:  # some chunks further
            further = before + draw.randint(1, 12)
            while process.poll() is None and finished(tmp_path / "out.partial") < further:
                time.sleep(0.001)
        kills += 1
        victims = [process.pid]
        if kills % 3 == 0:
            victims = workers_of(process.pid)[:1] if process.poll() is None else []
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it was done already
        output, errors = process.communicate(timeout=300)
        assert "Traceback" not in errors, errors
        assert process.returncode in (0, 2, -9), errors
        if process.returncode == 2:
            assert "a worker process was killed by SIGKILL" in errors
        if "continuing after" in errors:
            continued += 1
        if process.returncode == 0:
            assert outputs(tmp_path) == expected
            for path in tmp_path.glob("out.*"):
                path.unlink()
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert outputs(tmp_path) == expected
    assert not (tmp_path / "out.partial").exists()
    assert continued, "no kill came while chunks were encoded"


def test_a_kill_at_each_step_of_the_finish_costs_nothing(job_of, tmp_path, monkeypatch, capsys):
    """What is killed is a process; what goes on is the command in this one."""
    arguments, expected, _ = job_of(20)
    command = [*arguments, "--workers", 1, "--output", tmp_path / "out"]
    for module in (chunks, preprocess):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1_000_000)
    for step in range(1, 100):
        stopped = run(*command, KILL=str(step), CHUNK="1000000")
        if stopped.returncode == 0:
            break
        assert stopped.returncode == -9
        begun = step > 6 or (tmp_path / "out.partial" / "journal").exists() and finished(tmp_path / "out.partial")
        there = {path.name for path in tmp_path.iterdir()}
        for prefix in (tmp_path / "out", tmp_path / "out.validation"):
            if f"{prefix.name}.manifest.json" in there:
                manifests.check_files(prefix)
        assert main(["preprocess", *map(str, command)]) == 0, step
        said = capsys.readouterr().err
        if begun:
            assert any(words in said for words in ("continuing after", "have their names now",
                                                   "complete already")), (step, said)
            assert "damaged" not in said
        assert outputs(tmp_path) == expected, step
        assert not (tmp_path / "out.partial").exists()
        for path in tmp_path.iterdir():
            path.unlink()
    assert step > 8


@pytest.fixture(scope="module")
def killed(job_of, tmp_path_factory):
    """What a run left in its partial folder that was killed with some chunks finished."""
    folder = tmp_path_factory.mktemp("killed")
    with held(*job_of(20)[0], "--workers", 1, "--output", folder / "out") as process:
        process.kill()
        process.communicate()
    return folder / "out.partial"


def test_what_a_kill_left_while_the_folder_was_taken_away_goes(job_of, killed, tmp_path):
    command, partial = [*job_of(20)[0], "--workers", 1, "--output", tmp_path / "out"], tmp_path / "out.partial"
    assert run(*command).returncode == 0
    for left in ([], ["run.lock"], ["run.lock", "finished.json", "train.lengths"]):
        partial.mkdir()
        for name in left:
            (partial / name).touch()
        again = run(*command)
        assert again.returncode == 0 and "complete already" in again.stderr
        assert not partial.exists(), left
    shutil.copytree(killed, partial)
    (partial / "plan.json").unlink()  # whose chunks these are nobody knows: they stay
    assert run(*command).returncode == 0 and finished(partial)


@pytest.fixture
def half(job_of, killed, tmp_path):
    """(command, expected, partial folder) of a run that was killed with some chunks finished."""
    arguments, expected, _ = job_of(20)
    partial = shutil.copytree(killed, tmp_path / "out.partial")
    return [*arguments, "--workers", 1, "--output", tmp_path / "out"], expected, partial


def finished(partial):
    """Chunks in the journal; 0 where there is none."""
    journal = partial / "journal"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize("damage", ["bin", "lengths", "journal", "cut", "bin cut", "bin gone"])
def test_damage_in_the_partial_run_is_noticed(half, damage):
    command, expected, partial = half
    count = finished(partial)
    if damage in ("bin", "lengths"):
        flip(partial / f"train.{damage}", (partial / f"train.{damage}").stat().st_size // 3)
    elif damage == "journal":  # inside the second line
        flip(partial / "journal", (partial / "journal").read_bytes().index(b"\n") + 100)
    elif damage == "cut":
        os.truncate(partial / "journal", (partial / "journal").stat().st_size - 3)
    elif damage == "bin cut":
        os.truncate(partial / "train.bin", (partial / "train.bin").stat().st_size // 2)
    else:
        (partial / "train.bin").unlink()
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert outputs(partial.parent) == expected
    assert not partial.exists()
    if damage == "cut":
        assert f"continuing after {count - 1} finished chunks" in result.stderr
    elif damage == "journal":
        assert "continuing after 1 finished chunks" in result.stderr
    else:
        assert "is damaged; it and " in result.stderr


@pytest.mark.parametrize("change", ["input", "key", "tokenizer", "shard"])
def test_a_changed_run_leaves_the_others_finished_chunks_alone(half, change, tmp_path):
    command, expected, partial = half
    if change == "input":
        shutil.copytree(command[1], tmp_path / "input")  # with other times
        command[1] = tmp_path / "input"
    elif change == "key":
        shutil.copytree(command[1], tmp_path / "input", copy_function=shutil.copy2)
        (tmp_path / "input" / "d.parquet").unlink()
        command[1:2] = [tmp_path / "input", "--text-key", "other"]
        (tmp_path / "input" / "f.jsonl").write_text('{"other": "a word"}\n' * 50)
    elif change == "tokenizer":
        command += ["--eod-token", "<|reserved_1|>"]
    else:
        command += ["--shard", "1/2"]
    before, count = everything(partial), finished(partial)
    result = run(*command)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    said = {"input": "inputs.0.path: ", "key": "settings.text_key: 'text' -> 'other'; ",
            "tokenizer": "tokenizer: ", "shard": "settings.shard: "}
    assert f"{partial}: holds {count} finished chunks, of another run (begun with -> asked for): " in result.stderr
    assert said[change] in result.stderr and len(result.stderr) < 1500
    assert everything(partial) == before
    shutil.rmtree(partial)  # one of the ways out; another --output is the other
    result = run(*command)
    assert result.returncode == 0, result.stderr
    if change == "input":
        assert outputs(tmp_path)["out.bin"] == expected["out.bin"]


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "a list"])
def test_finished_chunks_without_their_plan_are_not_thrown_away(half, damage):
    command, expected, partial = half
    plan = partial / "plan.json"
    whole = plan.read_bytes()
    plan.write_bytes({"half": whole[: len(whole) // 2], "a list": b"[]"}.get(damage, b""))
    if damage == "gone":
        plan.unlink()
    before = everything(partial)
    result = run(*command)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "its plan.json is missing or damaged" in result.stderr and "delete that folder" in result.stderr
    assert everything(partial) == before
    plan.write_bytes(whole)
    result = run(*command)
    assert "continuing after" in result.stderr and outputs(partial.parent) == expected


def everything(folder):
    """What is in the folder, but for who holds it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}


def test_interrupt_says_that_the_same_command_continues(half):
    command, expected, partial = half
    with held(*command) as process:  # while it works
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert f"the same command continues from {partial}" in errors
    assert "Traceback" not in errors, errors
    for wait in (0, 0.05, 0.3):
        process = start(*command)
        assert process.stdout.readline() == "begun\n"  # Python itself has started
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=300)
        assert process.returncode in (130, -2, 0), errors
        if process.returncode == 0:  # it was done already: another one
            assert outputs(partial.parent) == expected
            for path in partial.parent.glob("out.*"):
                path.unlink()
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert outputs(partial.parent) == expected


def test_two_at_once_on_one_output(half):
    command, expected, partial = half
    with held(*command) as first:
        second = run(*command)
    assert second.returncode == 2
    assert f"--output: {partial} is in use by pid {first.pid} on " in second.stderr
    assert second.stderr.count("\n") == 1
    first.communicate(timeout=300)
    assert first.returncode == 0
    assert outputs(partial.parent) == expected


def test_an_output_that_is_taken_over_meanwhile_is_left_to_the_other(half):
    """As after a process that was stopped for a while, when another host has gone on with its work."""
    command, expected, partial = half
    with held(*command) as process:
        take_over(partial)
        before = everything(partial)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert errors.splitlines()[-1].startswith(f"megatron-encdec: {partial}/run.lock: is now held by pid "), errors
    assert not outputs(partial.parent) and "elsewhere" in (partial / "run.lock").read_text()
    after = everything(partial)
    assert {name: after[name] for name in before if name.startswith(("journal", "plan", "train.", "validation."))} == {
        name: before[name] for name in before if name.startswith(("journal", "plan", "train.", "validation."))}
    (partial / "run.lock").write_text("")
    assert run(*command).returncode == 0 and outputs(partial.parent) == expected
