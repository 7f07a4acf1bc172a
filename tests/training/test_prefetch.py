"""Micro-batches ahead of time: the same ones in the same order, mistakes where they belong, no thread left over."""

import threading
import time

import numpy as np
import pytest

from megatron_encdec.objectives.base import MicroBatch
from megatron_encdec.training.step import staged


def batches(count, drawn=None):
    for number in range(count):
        if drawn is not None:
            drawn.append(number)
        tokens_S = np.arange(4) + number
        yield MicroBatch(tokens_S[None], np.array([1]), tokens_S[1:2], np.array([0, 4], np.int32), 4, False, "causal",
                         (number,))


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_same_batches_in_the_same_order(ahead):
    with staged(batches(20), ahead) as ready:
        found = [(one.batch.samples, one.tensor("inputs_BS").tolist()) for one in ready]
    assert found == [((number,), [[number + place for place in range(4)]]) for number in range(20)]


def test_no_more_than_asked_for_is_drawn():
    drawn: list = []
    with staged(batches(20, drawn), 2) as ready:
        next(ready)
        time.sleep(0.3)
        assert len(drawn) <= 1 + 2 + 1  # handed out, waiting, in the thread's hand
    more = len(drawn)
    time.sleep(0.3)
    assert len(drawn) == more  # left in the middle: nobody goes on drawing


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_goes_wrong_is_raised_where_it_is_asked_for(ahead):
    def broken():
        yield from batches(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"), staged(broken(), ahead) as ready:
        seen = [next(ready).batch.samples for _ in range(3)]
        assert seen == [(0,), (1,), (2,)]
        next(ready)


def test_no_thread_is_left():
    before = threading.active_count()
    for _ in range(5):
        with staged(batches(9), 2) as ready:
            next(ready)
    assert threading.active_count() == before
