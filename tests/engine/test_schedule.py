"""The learning rate by step."""

import pytest

from megatron_encdec.engine.config import ScheduleSettings, learning_rate, steps_of_tokens


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


def test_decay_by_the_square_root():
    """arXiv 2405.18392: peak * (1 - sqrt(x)), x from 0 to 1 over the decay."""
    schedule = ScheduleSettings("wsd", decay_steps=100, decay="1-sqrt", final_fraction=0.1)

    def rate(step):
        return learning_rate(step, 400, 1e-3, schedule)

    assert rate(300) == 1e-3
    assert rate(325) == pytest.approx(1e-4 + 9e-4 * (1 - 0.25 ** 0.5))
    assert rate(400) == pytest.approx(1e-4)
    assert all(rate(step) > rate(step + 1) for step in range(300, 400))


@pytest.mark.parametrize(("tokens", "steps"), [(0, 0), (1, 1), (10, 1), (11, 2), (30, 3), (31, 4), (70, 4), (71, 5),
                                               (200, 8)])  # 3 steps of 10, 2 of 40; beyond that the last goes on
def test_tokens_come_to_the_steps_they_fall_on(tokens, steps):
    assert steps_of_tokens(tokens, [(3, 10), (2, 40)]) == steps


def test_a_schedule_in_tokens():
    pieces = [(3, 10), (2, 40)]
    found = ScheduleSettings(warmup_tokens=31, decay_tokens=41).in_steps(pieces)
    assert found == ScheduleSettings(warmup_steps=4, decay_steps=2)
    assert found.in_steps(pieces) == found


@pytest.mark.parametrize(("keys", "words"), [
    (dict(warmup_steps=3, warmup_tokens=9), "warmup_tokens: 9 is given beside warmup_steps=3; give one of the two"),
    (dict(decay_steps=3, decay_tokens=9), "decay_tokens: 9 is given beside decay_steps=3"),
    (dict(final_lr=1e-5, final_fraction=0.1), "final_fraction: 0.1 is given beside final_lr=1e-05"),
    (dict(final_fraction=10), "final_fraction: 10 is more than the peak"),
    (dict(warmup_tokens=-1), "warmup_tokens: -1 is not at least 0"),
])
def test_what_does_not_go_together(keys, words):
    with pytest.raises(ValueError, match=words):
        ScheduleSettings(**keys)
