"""Which rank is named when several end."""

import multiprocessing
import os
import signal
import time

import pytest

from megatron_encdec.platform import launcher


def _ends(seconds: float, how: int) -> None:
    time.sleep(seconds)
    if how < 0:
        os.kill(os.getpid(), -how)
    os._exit(how)


@pytest.mark.parametrize(("ends", "code", "said"), [
    ([(0, 1), (0.2, -9)], 137, "rank 1 (pid {1}) was killed by SIGKILL"),  # it took the other one with it
    ([(0.2, -9), (0, 1)], 137, "rank 0 (pid {0}) was killed by SIGKILL"),
    ([(0.1, 1), (0, 0)], 1, "rank 0 (pid {0}) ended with exit code 1"),
    ([(0, 0), (0, 2)], 2, ""),
    ([(0, 0), (0, 0)], 0, ""),
    ([(60, 0), (0, 1)], 1, "rank 1 (pid {1}) ended with exit code 1"),  # rank 0 is ended
])
def test_the_rank_that_began_it_is_named(ends, code, said, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    if code == 137:  # on a busy machine the killed rank may have begun long after the other one
        monkeypatch.setattr(launcher, "SETTLE_SECONDS", 20)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_ends, args=arguments) for arguments in ends]
    signals = launcher._Forwarder()
    try:
        for process in processes:
            process.start()
        assert launcher._wait(processes, signals) == code
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    err = capsys.readouterr().err
    assert said.format(*(process.pid for process in processes)) in err and err.count("rank") == (2 if said else 0)
