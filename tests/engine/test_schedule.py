"""The learning rate by step."""

import pytest

from megatron_encdec.engine.config import ScheduleSettings, learning_rate


def test_the_papers_schedule():
    schedule = ScheduleSettings("wsd", warmup_steps=2000, decay_steps=2000)

    def rate(step):
        return learning_rate(step, 42000, 5e-4, schedule)

    assert rate(1) == pytest.approx(5e-4 / 2000)
    assert rate(2000) == rate(2001) == rate(40000) == 5e-4
    assert rate(41000) == pytest.approx(2.5e-4)
    assert rate(42000) == 0.0


def test_cosine_and_final_rate():
    schedule = ScheduleSettings("cosine", warmup_steps=10, final_lr=1e-5)
    assert learning_rate(10, 110, 1e-3, schedule) == 1e-3
    assert learning_rate(60, 110, 1e-3, schedule) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(110, 110, 1e-3, schedule) == pytest.approx(1e-5)
    assert learning_rate(5, 5, 1e-3, ScheduleSettings("constant")) == 1e-3
