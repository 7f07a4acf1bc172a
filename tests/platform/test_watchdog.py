"""Ranks that hang, in processes of their own: who is named; and what the watchdog finds in given beats."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from small_run import forks

from megatron_encdec.platform import watchdog
from megatron_encdec.platform.distributed import Control
from megatron_encdec.platform.watchdog import Watchdog, mark

RANKS, TIMEOUT = 3, 4.0


def _rank(rank: int, how: str, folder: str) -> None:
    """Ends with exit code 0 where nothing was found."""
    with open(f"{folder}/said{rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    control = Control(timeout=600.0)
    dog = Watchdog(control, TIMEOUT)
    mark("step 1")
    control.highest(0)
    if rank == 1 and how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif rank == 1 and how == "reads forever":
        mark("reading samples")
        time.sleep(600)
    else:
        mark("reading samples")
        mark("step 2")
    control.highest(0)
    dog.close()
    os._exit(0)


@pytest.mark.parametrize(("how", "said"), [
    ("goes on", ""),
    ("stops", "rank 1 (pid {pid} on {host}) hangs: no sign of life for"),
    ("reads forever", "rank 1 (pid {pid} on {host}) hangs at: reading samples; the others wait for it"),
])
def test_who_hangs_is_named(tmp_path, how, said):
    ranks = [forks().Process(target=_rank, args=(rank, how, str(tmp_path))) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    try:
        ranks[0].join(300)
        assert ranks[0].exitcode == (1 if said else 0)
    finally:
        for rank in ranks:
            rank.kill() if said else rank.join(300)
    text = (tmp_path / "said0").read_text()
    assert said.format(pid=ranks[1].pid, host=os.uname().nodename) in text
    assert ("run.hang_timeout=4 s" in text and "continues from the newest checkpoint" in text) == bool(said)


@pytest.fixture
def dog(monkeypatch):
    """The watchdog of rank 0 of three, without its threads, 100 s after everyone was last heard, or marked anything."""
    monkeypatch.setattr(watchdog, "_progress", SimpleNamespace(marks=3, what="step 3", since=0.0, limit=None))
    one = Watchdog.__new__(Watchdog)
    one._rank, one._ranks, one._timeout, one._every = 0, 3, 10.0, 1.0
    one._names, one._heard = ["rank 0", "rank 1", "rank 2"], [100.0] * 3
    one._beats = [{"marks": 3, "what": "step 3"}, {"marks": 2, "what": "a save"}, {"marks": 2, "what": "step 2"}]
    return one


def test_all_that_are_waited_for_are_named(dog):
    assert dog._finding(5.0) is None
    watchdog._progress.limit = 600.0  # this may take long
    assert dog._finding(100.0) is None
    watchdog._progress.limit = None
    assert dog._finding(100.0) == ("nothing has moved for 100 s: rank 1 hangs at: a save; rank 2 hangs at: step 2; "
                                   "the others wait for it")
    dog._beats = dog._beats[:1] * 3
    assert dog._finding(100.0) == ("nothing has moved for 100 s on any rank, all at: step 3; none is behind the "
                                   "others")


def test_the_others_look_at_rank_0_alone(dog):
    dog._rank, dog._heard = 1, [80.0, 0.0, 0.0]
    assert dog._finding(90.0) is None
    assert dog._finding(100.0) == "rank 0 hangs: no sign of life for 20 s, last at: step 3"
