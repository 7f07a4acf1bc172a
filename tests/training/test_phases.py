"""From lengths in the config to steps, and what does not fit."""

import pytest
from small_run import BASE

from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import Config
from megatron_encdec.training.phases import Timeline, lay_out, with_phase_steps


def config_of(*overrides):
    data = schema.parse_yaml(BASE.format(root="x"), "base")
    for override in overrides:
        schema.apply_override(data, override, Config)
    return schema.build(Config, data)


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
    ((phases("steps: 0"),), "phases.0.steps: 0 is not positive"),
    (("schedule.warmup_steps=9", "schedule.decay_steps=9"), "more than its 12 steps"),
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
    base = Timeline(config_of(), ["f"])
    later = Timeline(config_of("phases.1.objective=mlm:0.5", "evaluation.every=7", "checkpoint.every=3"), ["f"])
    assert base.history(6) == later.history(6)
    assert base.history(7) != later.history(7)
    for change in ("data.seed=2", "optimizer.eps=1e-6", "run.seed=9", "batch.global_size=16", "optimizer.lr=1e-4",
                   "data.isolate_documents=false", "precision.dtype=bf16", "model.hidden_size=64"):
        assert Timeline(config_of(change), ["f"]).history(6) != base.history(6), change
    assert Timeline(config_of(), ["g"]).history(6) != base.history(6)
    longer = Timeline(config_of("phases.1.steps=60", "schedule.decay_steps=3"), ["f"])
    assert longer.history(9) == base.history(9)  # the decay had not begun
    assert longer.history(12) != base.history(12)


def test_a_phase_may_have_its_own_schedule():
    timeline = Timeline(config_of("phases.1.schedule={name: wsd, warmup_steps: 3}"), ["f"])
    assert timeline.learning_rate(6) == 5e-3
    assert timeline.learning_rate(7) == pytest.approx(5e-3 / 3)
    assert timeline.learning_rate(12) == 5e-3
