"""Lengths of phases: what is given is kept, shares of the run are rounded, and the total is met."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import build
from megatron_encdec.training.config import Config
from megatron_encdec.training.layout import MOST_STEPS, lay_out

TOKENS = 2 * 64  # of a step


def lengths(phases, total=None, **changes):
    config = {"run": {"dir": "run", "total": {"steps": total}}, "tokenizer": {"path": "none"},
              "model": {"preset": "tiny"}, "data": {"train": [{"path": "text"}], "sequence_length": 64},
              "batch": {"global_size": 2, "micro_size": 2}, "schedule": {"name": "constant"},
              "phases": [{"name": f"p{number}", "objective": "clm", **phase} for number, phase in enumerate(phases)]}
    return [one.steps for one in lay_out(build(Config, {**config, **changes}))]


@pytest.mark.parametrize("total, phases, expected", [
    (17, [{"fraction": 0.5}, {"steps": 9}], [8, 9]), (145, [{"steps": 72}, {"fraction": 0.5}], [72, 73]),
    (15, [{"fraction": 0.5}, {"steps": 7}], [8, 7]), (7, [{"fraction": 0.5}, {"fraction": 0.5}], [4, 3]),
    (10, [{"fraction": 0.36}, {"tokens": 6 * TOKENS}], [4, 6])])
def test_given_lengths_are_kept_and_the_total_is_met(total, phases, expected):
    assert lengths(phases, total) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(3, 500), st.data())
def test_of_any_phases(total, data):
    left, phases = total, []
    for _ in range(data.draw(st.integers(0, 3))):
        steps = data.draw(st.integers(1, max(1, left // 2)))
        phases.append({"steps": steps} if data.draw(st.booleans()) else {"tokens": steps * TOKENS - 5})
        left -= steps
    cuts = sorted(data.draw(st.sets(st.floats(0.05, 0.95), max_size=2)))
    shares = [{"fraction": (b - a) * left / total} for a, b in zip([0, *cuts], [*cuts, 1], strict=True) if left > 0]
    phases = data.draw(st.permutations(phases + shares))
    try:
        found = lengths(phases, total)
    except UserError as error:
        assert "less than one step" in str(error) or left <= 0
        return
    assert sum(found) == total
    for phase, steps in zip(phases, found, strict=True):
        if "fraction" in phase:
            assert abs(steps - phase["fraction"] * total) <= 1.5
        else:
            assert steps == phase.get("steps", -(-phase.get("tokens", 0) // TOKENS))


@pytest.mark.parametrize("phases, total, changes, said", [
    ([{"fraction": 0.5}, {"steps": 4}], 17, {}, "8 + 4 = 12 do not add up"),
    ([{"steps": MOST_STEPS + 1}], None, {}, "more than a run can have"),
    ([{"steps": 5, "name": ""}], None, {}, "name: '' has to be a word"),
    ([{"steps": 5, "name": "a\nb"}], None, {}, "on one line"),
    ([{"steps": 5, "lr": 1e-5}], None, {"schedule": {"name": "cosine", "final_lr": 1e-4}}, "above the peak of phase"),
    ([{"steps": 5, "lr": float("inf")}], None, {}, "phases.0.lr: inf is no finite number"),
    ([{"steps": 5, "rope_theta": 1}], None, {}, "rope_theta: 1.0 is not above 1"),
    ([{"steps": 5, "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
                                    "original_max_position_embeddings": 64}}], None, {}, "low_freq_factor: 4.0 is not"),
    ([{"steps": 5, "rope_scaling": {"rope_type": "yarn", "factor": 8, "beta_fast": 0.5,
                                    "original_max_position_embeddings": 64}}], None, {}, "beta_slow: 1 is not below"),
    ([{"steps": 5, "objective": {"name": "mixture", "parts": [{"objective": "clm", "weight": 1e308},
                                                              {"objective": "mlm"}]}}], None, {}, "at most")])
def test_what_cannot_be_is_one_line_with_its_key(phases, total, changes, said):
    with pytest.raises(UserError) as error:
        lengths(phases, total, **changes)
    assert said in str(error.value) and "\n" not in str(error.value)
