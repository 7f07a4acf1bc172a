"""Sweeps with real worker processes: order, resuming, failures, signals, kill -9, two sweeps at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_runs import grid, scores, train

from megatron_encdec.finetune.results_tree import plan, state_of, write_results
from megatron_encdec.finetune.sweep import Sweep, make_runner
from megatron_encdec.platform.children import Child
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.failure import write_failure
from megatron_encdec.rundir.lock import FolderLock

FUNCTION = "sweep_runs:train"
TESTS = str(Path(__file__).parents[1])


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers import the runs from tests/."""
    package = str(Path(TESTS).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, package, os.environ.get("PYTHONPATH", "")]))


def start(tree, workers=2, rates="0.1,0.2,0.3", seeds=4, how="slow"):
    """A sweep in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "sweep_runs", str(tree), str(workers), rates, str(seeds), how],
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    """Its last line."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def until(condition, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished(tree):
    return {path: path.stat().st_mtime_ns for path in tree.rglob("results.json")}


def group_is_gone(leader: int) -> bool:
    """Whether no process of the session `leader` runs any more (zombies apart)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            return False
    return True


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Results of the grid that `start` sweeps, each run alone in this process."""
    tree = tmp_path_factory.mktemp("alone")
    for run in grid(tree, (0.1, 0.2, 0.3), range(4)):
        run.directory.mkdir(parents=True)
        write_results(run.directory, train(run, lambda step, total: None))
    return scores(tree)


def test_a_grid(tmp_path, capfd):
    outcome = Sweep(grid(tmp_path), FUNCTION, workers=2).run()
    assert (outcome.finished, outcome.failed, outcome.ran, outcome.left) == (6, [], 6, 0)
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("results.json")]
    assert len({record["process"]["pid"] for record in records}) == 2
    assert max(record["process"]["runs"] for record in records) >= 3  # several runs in one process
    said = capfd.readouterr().out
    assert "6/6  m/SC/blobs/lr" in said and "validation" in said and "trained" not in said
    assert (tmp_path / "m/SC/blobs/lr0.1_sd0/log.txt").read_text() == "trained 0.1 0\n"
    assert json.loads((tmp_path / "m/SC/blobs/grid.json").read_text())["runs"] == [
        f"lr{rate}_sd{seed}" for rate in (0.1, 0.2, 0.4) for seed in (0, 1)]


def test_neighbours_in_a_process_change_nothing(tmp_path, expected):
    Sweep(grid(tmp_path, (0.1, 0.2, 0.3), range(4)), FUNCTION, workers=1).run()
    assert scores(tmp_path) == expected


def test_a_finished_run_is_never_repeated(tmp_path):
    Sweep(grid(tmp_path, rates=(0.1,)), FUNCTION).run()
    before = finished(tmp_path)
    outcome = Sweep(grid(tmp_path, rates=(0.1, 0.2)), FUNCTION).run()
    assert outcome.ran == 2 and outcome.finished == 4
    assert before.items() <= finished(tmp_path).items()
    assert Sweep(grid(tmp_path, rates=(0.1, 0.2)), FUNCTION).run().ran == 0


def test_a_worker_keeps_to_one_dataset(tmp_path):
    runs = [run for pair in zip(grid(tmp_path, dataset="a"), grid(tmp_path, dataset="b"), strict=True)
            for run in pair]
    Sweep(runs, FUNCTION, workers=2).run()
    pids = {dataset: [json.loads(path.read_text())["process"]["pid"]
                      for path in (tmp_path / "m/SC" / dataset).rglob("results.json")] for dataset in "ab"}
    assert len(set(pids["a"]) & set(pids["b"])) <= 1  # who is done first may help the other


def test_failures_are_recorded_with_their_reason(tmp_path, capfd):
    outcome = Sweep(grid(tmp_path, how="diverges"), FUNCTION).run()
    assert outcome.finished == 4 and len(outcome.failed) == 2 and outcome.left == 0
    folder = tmp_path / "m/SC/blobs/lr0.4_sd0"
    record = json.loads((folder / "failure.json").read_text())
    assert record["reason"] == "FloatingPointError: loss is not finite at step 20"
    assert "go_wrong" in record["traceback"] and not (folder / "results.json").exists()
    assert "FAILED: FloatingPointError: loss is not finite at step 20" in capfd.readouterr().out
    again = Sweep(grid(tmp_path, how="plain"), FUNCTION).run()
    assert again.ran == 0 and len(again.failed) == 2  # known, and said again
    retried = Sweep(grid(tmp_path, how="plain"), FUNCTION, retry_failed=True).run()
    assert retried.ran == 2 and retried.finished == 6 and not (folder / "failure.json").exists()


def test_a_killed_worker_gets_another_chance(tmp_path, capfd):
    outcome = Sweep(grid(tmp_path, how="is killed once"), FUNCTION, workers=2).run()
    assert outcome.finished == 6 and not outcome.failed
    assert "was killed by SIGKILL" in capfd.readouterr().out


def test_a_run_that_kills_its_process_twice_has_failed(tmp_path):
    outcome = Sweep(grid(tmp_path, seeds=(0,), how="is killed"), FUNCTION).run()
    assert outcome.finished == 2
    assert outcome.failed[0][1].startswith("its process was killed by SIGKILL") and "2 times" in outcome.failed[0][1]
    assert state_of(tmp_path / "m/SC/blobs/lr0.4_sd0") == "failed"


def test_a_mistake_is_no_result(tmp_path):
    """What the user must mend is said once; runs of other datasets go on, and nothing is recorded as failed."""
    runs = grid(tmp_path, rates=(0.4, 0.1), how="mistake") + grid(tmp_path, rates=(0.1,), dataset="good")
    outcome = Sweep(runs, FUNCTION).run()
    assert outcome.mistakes == ["data.train: no such file"] and not outcome.failed
    assert outcome.finished == 2 and outcome.left == 4
    assert not list(tmp_path.rglob("failure.json"))
    absent = Sweep(grid(tmp_path), "no_such_package_here:train").run()
    assert "no_such_package_here" in absent.mistakes[0] and absent.left == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly_and_the_same_command_goes_on(tmp_path, expected, number):
    process = start(tmp_path)
    until(lambda: len(finished(tmp_path)) >= 3)
    process.send_signal(number)
    said = finish(process)
    assert said["stopped_by"] == number
    assert group_is_gone(process.pid)
    assert 3 <= said["finished"] < 12 and said["failed"] == 0 and said["left"] == 12 - said["finished"]
    before = finished(tmp_path)
    assert len(before) == said["finished"]
    again = finish(start(tmp_path, how="plain"))
    assert again["finished"] == 12 and again["ran"] == 12 - len(before)
    assert before.items() <= finished(tmp_path).items() and scores(tmp_path) == expected


def test_kill_9_of_the_sweep(tmp_path, expected):
    """Again and again, a bit later each time: workers end too, and what is there is complete."""
    for kill in range(3):
        process = start(tmp_path)
        count = len(finished(tmp_path))
        until(lambda count=count: len(finished(tmp_path)) > count)
        time.sleep(0.05 * kill)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda process=process: group_is_gone(process.pid))
        process.stdout.close()
        process.stderr.close()
    before = finished(tmp_path)
    assert not list(tmp_path.rglob("failure.json"))
    again = finish(start(tmp_path, how="plain"))
    assert again["ran"] == 12 - len(before) and before.items() <= finished(tmp_path).items()
    assert scores(tmp_path) == expected


def test_two_sweeps_share_the_runs(tmp_path, expected):
    """Both end with everything finished, and no run is done twice."""
    one, two = start(tmp_path, workers=1), start(tmp_path, workers=1)
    said = [finish(process) for process in (one, two)]
    assert [one["finished"] for one in said] == [12, 12]
    assert sum(one["ran"] for one in said) == 12 and all(one["ran"] for one in said)
    assert scores(tmp_path) == expected


def test_a_run_that_its_other_sweep_gave_up_is_done_here(tmp_path):
    one = start(tmp_path, workers=1, rates="0.1", seeds=2)
    until(lambda: (tmp_path / "m/SC/blobs/lr0.1_sd0/run.lock").exists())
    two = start(tmp_path, workers=1, rates="0.1", seeds=2)
    until(lambda: (tmp_path / "m/SC/blobs/lr0.1_sd1/run.lock").exists())
    os.kill(one.pid, signal.SIGKILL)
    one.communicate()
    assert finish(two)["finished"] == 2


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    run = SimpleNamespace(directory=tmp_path / "run")
    with FolderLock(run.directory, "results"):
        kind, holder = make_runner(FUNCTION)(run)
    assert kind == "elsewhere" and str(os.getpid()) in holder
    assert state_of(run.directory) == "todo"


def test_a_run_that_is_taken_over_meanwhile_writes_nothing(tmp_path):
    """Its sweep was stopped for a while, and one on another host has gone on with the run."""
    run, answer = grid(tmp_path, (0.4,), (0,), "is taken over")[0], None
    child = Child()
    child.begin("megatron_encdec.finetune.sweep:make_runner", (FUNCTION,))
    child.send(run)
    while answer is None:
        kind, content = child.receive()
        answer = content if kind == "answer" else None
    child.close()
    assert answer[0] == "taken" and "on elsewhere" in answer[1]
    assert state_of(run.directory) == "todo" and "elsewhere" in (run.directory / "run.lock").read_text()


def test_plans_of_many_processes_at_once_add_up(tmp_path):
    code = """
import sys
from pathlib import Path
from megatron_encdec.finetune.results_tree import plan
for seed in range(10):
    plan([Path(sys.argv[1], "a", f"lr{sys.argv[2]}_sd{seed}")])
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rate)]) for rate in range(1, 5)]
    assert [process.wait(300) for process in processes] == [0] * 4
    planned = json.loads((tmp_path / "a/grid.json").read_text())["runs"]
    assert sorted(planned) == sorted(f"lr{rate}_sd{seed}" for rate in range(1, 5) for seed in range(10))


def test_plans_add_up(tmp_path):
    plan([tmp_path / "a/lr1_sd0"])
    plan([tmp_path / "a/lr1_sd1", tmp_path / "b/lr1_sd0"])
    assert json.loads((tmp_path / "a/grid.json").read_text())["runs"] == ["lr1_sd0", "lr1_sd1"]
    assert json.loads((tmp_path / "b/grid.json").read_text())["runs"] == ["lr1_sd0"]


@pytest.mark.parametrize("content", ["", "{half", "[]", '{"other": 1}', '{"runs": 3}'])
def test_a_damaged_plan_is_not_written_over(tmp_path, content):
    plan([tmp_path / "a/lr1_sd0"])
    (tmp_path / "a/grid.json").write_text(content)
    with pytest.raises(UserError, match=r"a/grid\.json: .*; mend it, or delete it .*this sweep alone"):
        plan([tmp_path / "a/lr1_sd1"])
    assert (tmp_path / "a/grid.json").read_text() == content
    (tmp_path / "a/grid.json").unlink()
    plan([tmp_path / "a/lr1_sd1"])
    assert json.loads((tmp_path / "a/grid.json").read_text())["runs"] == ["lr1_sd1"]


def test_a_reason_is_one_line(tmp_path):
    write_failure(tmp_path / "run", "first\n  second")
    assert json.loads((tmp_path / "run/failure.json").read_text())["reason"] == "first second"


def test_a_run_without_a_score_has_failed(tmp_path):
    """A correlation with what is all the same is no number; kept as a result it would spoil every report."""
    (run,) = grid(tmp_path, (0.1,), (0,), how="nan")
    outcome = Sweep([run], FUNCTION).run()
    assert [reason for _, reason in outcome.failed] and "validation has no score (nan)" in outcome.failed[0][1]
    assert state_of(run.directory) == "failed"
