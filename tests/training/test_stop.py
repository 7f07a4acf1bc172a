"""How a time limit is written, and when it is near."""

import time

import pytest

from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.stop import TimeLimit, seconds_of


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
    assert not limit.is_near()
    limit.saved(11)  # 1.5 x 11 s, and 5 s for the end
    assert limit.is_near()
    assert TimeLimit(20, time.time(), bytes_to_save=11 * 10**8).is_near()  # a first save of 11 s is expected
    assert TimeLimit(20, time.time() - 16, bytes_to_save=0).is_near()  # started 16 s ago
