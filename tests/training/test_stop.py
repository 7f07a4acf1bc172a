"""How a time limit is written, and when it is near."""

import os
import signal
import time

import pytest
from small_run import wait_until

from megatron_encdec.interop.source import groups
from megatron_encdec.platform.control import Control
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.signals import StopSignals
from megatron_encdec.training.stop import Stopper, TimeLimit, seconds_of


@pytest.mark.parametrize(("text", "seconds"), [
    ("90s", 90), ("45m", 2700), ("3h30m", 12600), ("1d2h", 93600), ("02:30:00", 9000), ("1-12:00:00", 129600),
    ("1h0m5s", 3605), ("100:00:00", 360000)])
def test_written_forms(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "3.5h", "30m2h", "1:2:3", "12:30", "0s", "-5s", "soon"])
def test_what_is_none(text):
    with pytest.raises(UserError, match="--time-limit"):
        seconds_of(text)


def test_near_when_a_step_and_a_save_no_longer_fit():
    limit = TimeLimit(20, time.time(), bytes_to_save=0)
    assert not limit.is_near(0.0)
    assert limit.is_near(11.0)  # 1.5 x 11 s, and 5 s for the end
    limit.saved(11)
    assert limit.is_near(0.0)
    assert TimeLimit(20, time.time(), bytes_to_save=11 * 10**8).is_near(0.0)  # a first save of 11 s is expected
    assert TimeLimit(20, time.time() - 16, bytes_to_save=0).is_near(0.0)  # started 16 s ago


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, (1, 1)), (0.05, (2, 50))])
def test_ranks_ask_each_other_after_every_step_or_after_so_much_time(seconds, steps):
    """The second is what a GPU's ranks do; steps take about no time here, counted as a millisecond."""
    with groups(), StopSignals() as signals:
        stopper = Stopper(Control(30), signals, None, seconds)
        stopper.agree()
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: signals.received, "the signal")
        taken = 0
        while not stopper.reason:
            stopper.agree()
            taken += 1
        assert stopper.reason == "stopped by SIGUSR1" and steps[0] <= taken <= steps[1]
