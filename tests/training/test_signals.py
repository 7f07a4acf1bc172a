"""Ending early: signals to the launcher, to a rank, to torchrun; a launcher that is gone; a time limit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import PATIENCE, metrics, ranks_of, run_cli, start_cli, start_cold, steps_done, wait_until

LONG = ("phases.0.steps=2000", "phases.1.steps=2000")


@pytest.fixture
def begin(root, tmp_path):
    """A function: a run of many steps, under way; (process, run directory, file with its output)."""
    started = []

    def call(*arguments, steps=3, **environment):
        run, output = tmp_path / "run", tmp_path / "output"
        process = start_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, *arguments, output=output,
                            **environment)
        started.append(process)
        wait_until(lambda: steps_done(run) >= steps or process.poll() is not None, "the first steps")
        assert process.poll() is None, output.read_text()
        return process, run, output

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def expected(root, tmp_path_factory):
    """A function: train lines of that run up to a step, on one rank or more; it is trained as far as is asked for."""
    done = {}

    def lines(step: int, ranks: int = 1) -> list[dict]:
        run = done.setdefault(ranks, tmp_path_factory.mktemp("expected") / "run")
        if steps_done(run) < step:
            run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, "--until", max(step, 30),
                    *(["--nproc", str(ranks)] if ranks > 1 else []))
        return metrics(run)[:step]

    return lines


def stopped_at(run) -> int:
    """Step of the newest checkpoint, which must be the last step logged."""
    step = int((run / "checkpoints/latest").read_text().removeprefix("step_"))
    assert metrics(run)[-1]["step"] == step
    return step


def continues(root, run, expected):
    """A few more steps, on two ranks, give the lines of the unbroken run, each once."""
    step = stopped_at(run) + 3
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, "--until", step, "--nproc", "2")
    assert metrics(run) == expected(step, ranks=2)


def test_the_launcher_saves_and_exits_0(begin, root, expected):
    process, run, output = begin("--nproc", "2")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0, output.read_text()
    said = output.read_text()
    assert f"stopped by SIGTERM after step {stopped_at(run)} of 4000, checkpoint saved" in said
    assert "the same command goes on" in said and "Traceback" not in said
    continues(root, run, expected)


def test_a_signal_before_the_first_step_ends_with_nothing_done(root, tmp_path):
    process = start_cold("pretrain", root / "config.yaml", f"run.dir={tmp_path / 'run'}", *LONG,
                         output=tmp_path / "output")
    status = Path(f"/proc/{process.pid}/status")
    wait_until(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1,
               "its handlers")  # imports have yet to come
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0, (tmp_path / "output").read_text()
    assert "stopped by SIGTERM after step 0 of 4000, nothing was to be saved" in (tmp_path / "output").read_text()
    assert not (tmp_path / "run/checkpoints/latest").exists()


def test_one_rank_alone_is_told_as_under_srun(root, tmp_path, expected):
    run, port = tmp_path / "run", 20000 + os.getpid() % 20000
    ranks = [start_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, output=tmp_path / f"rank{rank}",
                       SLURM_JOB_ID="1", SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURM_NTASKS="2",
                       SLURM_LOCALID=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(2)]
    wait_until(lambda: steps_done(run) >= 3, "the first steps")
    ranks[1].send_signal(signal.SIGUSR1)  # rank 0 hears of it from rank 1
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0], (tmp_path / "rank0").read_text()
    assert "stopped by SIGUSR1" in (tmp_path / "rank0").read_text()
    continues(root, run, expected)


def test_stopped_and_finished_can_be_told_apart(root, tmp_path):
    for until, limit, code in ((5, "10m", 0), (4000, "1s", 85)):  # what was asked for is done; it is stopped
        run_cli("pretrain", root / "config.yaml", f"run.dir={tmp_path / 'run'}", *LONG, "--until", until,
                "--nproc", "2", "--time-limit", limit, "--stopped-exit-code", "85", code=code)
    for code in ("2", "113", "-1"):
        said = run_cli("pretrain", root / "config.yaml", "--stopped-exit-code", code, code=2).stderr
        assert f"--stopped-exit-code {code}: a code from 3 to 99" in said


def test_a_second_signal_ends_at_once(begin):
    process, run, output = begin("--nproc", "2")
    stuck = ranks_of(process)[1]
    os.kill(stuck, signal.SIGSTOP)  # so that rank 0 waits for it in C code and nothing can be saved
    process.send_signal(signal.SIGTERM)
    time.sleep(3)  # well over the second in which it would be the same signal, also for a rank that hears of it late
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert "a second SIGTERM" in output.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(stuck, 0)
    assert not (run / "checkpoints/latest").exists()


def test_one_process_saves_and_exits_as_it_was_told(begin):
    process, run, output = begin("--stopped-exit-code", "85")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 85, output.read_text()
    assert "stopped by SIGUSR1" in output.read_text()


def test_ranks_whose_launcher_was_killed_save_and_end(begin, root, expected):
    process, run, output = begin("--nproc", "2")
    ranks = ranks_of(process)
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(rank) for rank in ranks), "the end of the ranks")
    assert "the launcher is gone" in output.read_text()
    continues(root, run, expected)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_torchrun_loses_nothing(number, root, tmp_path, expected):
    """SIGTERM makes the agent exit 1 although the ranks exit 0; SIGUSR1 kills the agent: the ranks notice."""
    run, output = tmp_path / "run", tmp_path / "output"
    with open(output, "w") as file:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
             "megatron_encdec", "pretrain", str(root / "config.yaml"), f"run.dir={run}", *LONG],
            stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_until(lambda: steps_done(run) >= 3 or agent.poll() is not None, "the first steps")
    ranks = ranks_of(agent)
    agent.send_signal(number)
    assert agent.wait(PATIENCE) == (1 if number == signal.SIGTERM else -number), output.read_text()
    wait_until(lambda: not any(alive(rank) for rank in ranks), "the end of the ranks")
    said = output.read_text()
    assert "checkpoint saved; the same command goes on" in said
    assert ("stopped by SIGTERM" if number == signal.SIGTERM else "the launcher is gone") in said
    continues(root, run, expected)


def test_a_time_limit_is_kept(root, tmp_path, expected):
    begun = time.monotonic()
    run_cli("pretrain", root / "config.yaml", f"run.dir={tmp_path / 'short'}", *LONG, "--until", "5")
    limit = 8 + round(2 * (time.monotonic() - begun))  # of what this machine needs to start and to stop
    run, begun = tmp_path / "run", time.monotonic()
    result = run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *LONG, "--time-limit", f"{limit}s")
    assert time.monotonic() - begun < limit
    assert f"stopped before the time limit after step {stopped_at(run)} of 4000" in result.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kind"] == "checkpoint" and lines[-1]["step"] == stopped_at(run)
    lines = metrics(run)[:30]
    assert lines == expected(len(lines))
