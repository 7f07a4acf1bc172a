"""From lengths in the config to steps, and what does not fit."""

import pytest
from small_run import config_of, timeline_of

from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import Config
from megatron_encdec.training.layout import declarations, lay_out, with_phase_steps


def phases(*lengths):
    return "phases=[" + ", ".join(
        f"{{name: p{i}, objective: {'clm' if i % 2 == 0 else 'mlm'}, {length}}}"
        for i, length in enumerate(lengths)) + "]"


@pytest.mark.parametrize(("overrides", "ends"), [
    ((phases("steps: 10", "steps: 32"),), [10, 42]),
    (("run.total.steps=42", phases("fraction: 0.25", "fraction: 0.75")), [10, 42]),  # 10.5 -> 10, as round() has it
    (("run.total.tokens=5120", phases("tokens: 1024", "tokens: 4096")), [2, 10]),
    ((phases("tokens: 600", "steps: 7"),), [2, 9]),
    (("run.total.steps=9", phases("fraction: 0.3333333333", "fraction: 0.3333333333", "fraction: 0.3333333334")),
     [3, 6, 9]),
])
def test_lengths(overrides, ends):
    assert [phase.end for phase in lay_out(config_of(*overrides))] == ends


@pytest.mark.parametrize(("overrides", "words"), [
    (("run.total.steps=13",), "do not add up to the run's total of 13"),
    ((phases("fraction: 0.5", "fraction: 0.5"),), "run.total.steps or run.total.tokens must be given"),
    (("run.total.steps=10", phases("fraction: 0.01", "fraction: 0.99")), "less than one step"),
    ((phases("steps: 3", "steps: 3, tokens: 100"),), "exactly one of steps, tokens, fraction"),
    ((phases("steps: 0"),), "phases.0.steps: 0 is not above 0"),
    (("schedule.warmup_steps=9", "schedule.decay_steps=9"), "more than its 12 steps"),
    (("schedule.warmup_steps=0", "schedule.warmup_tokens=5121"),
     r"schedule: warmup_tokens=5121 \(11 steps\) \+ decay_steps=3 is more than its 12 steps"),
    (("phases.1.schedule={decay_tokens: 4e3}",),
     r"phases.1.schedule: .* decay_tokens=4000 \(8 steps\) is more than its 6 steps"),
    (("phases.1.name=causal",), "'causal' is given 2 times"),
    (("run.total={steps: 3, tokens: 4}",), "not both"),
])
def test_what_does_not_fit(overrides, words):
    with pytest.raises(UserError, match=words):
        lay_out(config_of(*overrides))


def test_resolved_phases_are_the_same_phases():
    config = config_of("run.total.steps=42", phases("fraction: 0.25", "fraction: 0.75"))
    resolved = schema.build(Config, schema.to_dict(with_phase_steps(config, lay_out(config))))
    assert [p.end for p in lay_out(resolved)] == [p.end for p in lay_out(config)]


def test_history_knows_the_past_and_nothing_later():
    base = timeline_of()
    later = timeline_of("phases.1.objective=mlm:0.5", "evaluation.every=7", "checkpoint.every=3")
    assert base.history(6) == later.history(6)
    assert base.history(7) != later.history(7)
    for change in ("data.seed=2", "optimizer.eps=1e-6", "run.seed=9", "batch.global_size=16", "optimizer.lr=1e-4",
                   "data.isolate_documents=false", "precision.dtype=bf16", "model.hidden_size=64"):
        assert timeline_of(change).history(6) != base.history(6), change
    assert timeline_of(fingerprints="g").history(6) != base.history(6)
    longer = timeline_of("phases.1.steps=60", "schedule.decay_steps=3")
    assert longer.history(9) == base.history(9)  # the decay had not begun
    assert longer.history(12) != base.history(12)


def test_history_is_the_same_in_whatever_order_it_is_asked_for():
    fresh = {step: timeline_of().history(step) for step in (3, 6, 7, 12)}
    one = timeline_of()
    assert all(one.history(step) == fresh[step] for step in (12, 7, 3, 6, 12))


def test_a_change_of_precision_cuts_a_stretch():
    before, after = timeline_of(), timeline_of("precision.dtype=bf16")
    assert after.adopting(before.history(12)).stretches == before.stretches  # all of it is done
    mixed = after.adopting(before.history(4))
    assert [(one.start, one.end, one.first_sample, one.precision["dtype"]) for one in mixed.stretches] == [
        (0, 4, 0, "fp32"), (4, 6, 32, "bf16"), (6, 12, 48, "bf16")]
    assert mixed.history(4) == before.history(4) and mixed.adopting(before.history(4)).history(9) == mixed.history(9)
    assert mixed.phase_ends == {6, 12} and mixed.of_sample(40) == (mixed.stretches[1], 6)
    back = before.adopting(mixed.history(10))
    assert [(one.start, one.end, one.precision["dtype"]) for one in back.stretches] == [
        (0, 4, "fp32"), (4, 6, "bf16"), (6, 10, "bf16"), (10, 12, "fp32")]


def test_a_phase_may_have_its_own_schedule():
    timeline = timeline_of("phases.1.schedule={name: wsd, warmup_steps: 3}")
    rates = {step: timeline.at(step).learning_rate(step) for step in (6, 7, 12)}
    assert rates == {6: 5e-3, 7: pytest.approx(5e-3 / 3), 12: 5e-3}


def test_tokens_of_a_schedule_are_steps_by_the_stretches():
    in_steps = timeline_of("schedule.warmup_steps=3", "phases.1.schedule={decay_steps: 4}")
    in_tokens = timeline_of("schedule={warmup_tokens: 1025, decay_tokens: 1536}",
                            "phases.1.schedule={decay_tokens: 1537}")
    assert in_tokens.history(12) == in_steps.history(12)


def test_keys_that_say_nothing_are_named():
    schedules = (config_of(f"schedule={{{keys}}}").schedule for keys in (
        "name: cosine, decay_steps: 3, final_lr: 1e-5", "name: constant, final_fraction: 0.1",
        "name: wsd, decay_steps: 3"))
    assert [schedule.unused() for schedule in schedules] == [["decay_steps=3"], ["final_fraction=0.1"], []]


def test_a_rate_on_its_way_up_has_not_decayed():
    stretch = lay_out(config_of("schedule={name: wsd, warmup_steps: 4, decay_steps: 3}"))[0]
    assert stretch.learning_rate(1) < 0.5 * stretch.optimizer.lr and not stretch.has_decayed(1)
    assert not stretch.has_decayed(6) and lay_out(config_of("schedule.decay_steps=3"))[-1].has_decayed(12)


def test_sources_are_named_where_they_stand():
    """A phase that changes the windows alone reads what an earlier section gives."""
    stretches = lay_out(config_of("phases=[{name: a, objective: clm, steps: 1, data: {sequence_length: 32}}, {name: b, "
                                  "objective: clm, steps: 1, data: {train: [{path: text}]}}, {name: c, objective: clm, "
                                  "steps: 1, data: {sequence_length: 16}}]", "schedule={name: constant}"))
    assert [one.train_key for one in stretches] == ["data.train", "phases.1.data.train", "phases.1.data.train"]
    assert [one.data_section for one in stretches] == ["phases.0.data", "phases.1.data", "phases.2.data"]
    assert [one.key for one in declarations(stretches)] == [one.train_key for one in stretches]
