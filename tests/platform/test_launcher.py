"""Which rank is named when several end."""

import multiprocessing
import os
import signal
import time

import pytest

from megatron_encdec.platform import errors, launcher
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
        assert launcher._wait(processes, signals) == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    err = capsys.readouterr().err
    assert said.format(*(process.pid for process in processes)) in err and err.count("rank") == (2 if said else 0)
