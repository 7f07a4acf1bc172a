"""The progress line: epoch of the data, time left of phase and run, what holds the run up, the loss as a curve."""

import time
from collections import Counter

import pytest
from small_run import timeline_of

from megatron_encdec.platform.progress import sparkline
from megatron_encdec.training.pace import CURVE_POINTS, EVALUATING, SAVING, Pace


class Data:
    """Epochs in place of a run's data: sample i is the i-th of 100 windows, and of 400."""

    def __init__(self, *windows):
        self._windows = windows

    def of(self, index):
        return self

    def epochs(self, end):
        return [end / windows for windows in self._windows]


@pytest.fixture
def clock(monkeypatch):
    """A clock of our own: clock(seconds) lets them pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds
    return passes


def going(pace: Pace, timeline, clock, steps, seconds, waited=0.0):
    for step in steps:
        clock(seconds)
        pace.step(timeline.at(step), waited)


def test_time_left_of_phase_and_run(clock):
    timeline = timeline_of("phases.0.steps=100", "phases.1.steps=500")
    pace = Pace(timeline, Data(100), 0, 600)
    assert pace.left(0) == "? left"
    going(pace, timeline, clock, range(1, 41), 2.0)
    assert pace.left(40) == "2:00 left of causal, 18:40 of the run"
    assert pace.left(100) == "16:40 left"  # the last phase, and the run
    assert Pace(timeline, Data(100), 0, 60)._last == 60


def test_until_is_the_end(clock):
    timeline = timeline_of("phases.0.steps=100", "phases.1.steps=500")
    pace = Pace(timeline, Data(100), 0, 60)
    going(pace, timeline, clock, range(1, 41), 2.0)
    assert pace.left(40) == "0:40 left"


def test_a_later_phase_with_longer_windows_takes_longer(clock):
    timeline = timeline_of("phases.0.steps=10", "phases.1.steps=10", "phases.1.data={sequence_length: 128}")
    pace = Pace(timeline, Data(100), 0, 20)
    going(pace, timeline, clock, range(1, 6), 1.0)
    assert pace.left(5) == "0:05 left of causal, 0:25 of the run"


def test_what_is_notable_is_said(clock):
    timeline = timeline_of()
    pace = Pace(timeline, Data(100), 0, 12)
    going(pace, timeline, clock, range(1, 5), 1.0, waited=0.05)
    assert pace.detail(4) == "epoch 0.32"
    going(pace, timeline, clock, range(5, 9), 1.0, waited=0.8)
    pace.held(SAVING, 2.0)
    pace.held(EVALUATING, 0.1)
    assert pace.detail(8) == "epoch 0.64  waiting for data 43% of the time  saving 25% of the time"


def test_several_sources_have_a_span(clock):
    pace = Pace(timeline_of(), Data(100, 400), 0, 12)
    assert pace.detail(10) == "epochs 0.20 to 0.80"


def test_the_curve_of_a_phase():
    pace = Pace(timeline_of(), Data(100), 0, 12)
    for step in range(10):
        curve = pace.curve("causal", "clm", 10.0 - step, "12345678")
    assert curve == "8766543321"
    assert pace.curve("masked", "mlm", 5.0, "12345678") == "1"
    for step in range(3 * CURVE_POINTS):
        curve = pace.curve("masked", "mlm", float(step), "12345678")
    assert len(curve) == 24 and list(curve) == sorted(curve) and Counter(curve).keys() == set("12345678")
    assert pace.curve("masked", "clm", 1000.0, "12345678") == curve  # objectives in turn: the first one's
    assert pace.curve("masked", "mlm", None, "12345678") == curve  # nothing was labelled


@pytest.mark.parametrize("values, shown", [([], ""), ([1.0], "▁"), ([1.0, 1.0], "▁▁"), ([0.0, 7.0], "▁█"),
                                           ([0.0, 1.0, 2.0, 3.0], "▁▃▆█")])
def test_a_line_of_blocks(values, shown):
    assert sparkline(values) == shown
