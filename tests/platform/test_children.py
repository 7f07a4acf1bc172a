import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_encdec.platform.children import LOOK_AHEAD_PER_CHILD, Pool
from megatron_encdec.platform.errors import UserError

APPLY = "functools:partial"  # a factory from the standard library: partial(f) answers f(item)


def test_answers_come_in_order_with_a_bounded_look_ahead():
    taken = []

    def items():
        for i in range(30):
            taken.append(i)
            yield range(20_000 * (3 - i % 4), -1, -1)  # the first of each four takes longest

    with Pool(2) as pool:
        pool.begin(APPLY, (sorted,))
        answers = pool.map_ordered(items())
        assert len(next(answers)) == 60_001
        assert len(taken) <= 2 * LOOK_AHEAD_PER_CHILD
        assert [len(answer) for answer in answers] == [20_000 * (3 - i % 4) + 1 for i in range(1, 30)]


def test_errors_of_a_worker_reach_the_caller(tmp_path):
    with Pool(1) as pool, pytest.raises(UserError, match="no tokenizer here"):
        list(pool.begin("megatron_encdec.text.tokenizer:load_tokenizer", (str(tmp_path),)).map_ordered(["x"]))
    with Pool(1) as pool, pytest.raises(RuntimeError, match="invalid literal for int"):
        list(pool.begin(APPLY, (int,)).map_ordered(["1", "x", "2"]))


def test_a_killed_worker_is_a_user_error():
    message = "ended with exit code 3.*fewer workers"
    with Pool(2) as pool, pytest.raises(UserError, match=message):
        list(pool.begin(APPLY, (os._exit,)).map_ordered([3, 3, 3, 3]))


def test_workers_end_with_a_killed_parent():
    script = ("import os, sys, time; from megatron_encdec.platform.children import Pool\n"
              "pool = Pool(2).begin('functools:partial', (abs,))\n"
              "list(pool.map_ordered([1, 2]))\n"
              "print(*[child.process.pid for child in pool.children], flush=True); time.sleep(600)")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 300
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def is_running(pid):
    """Whether the process runs (one that ended but has no parent to collect it does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
