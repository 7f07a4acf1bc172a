"""How an objective is named in a config, and what the table of objectives promises to the rest."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import OBJECTIVES, Labelled, Objective, Vocabulary, evaluated
from megatron_encdec.objectives.clm import CLM
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import to_dict

WHERE = "phases.1.objective"


@pytest.mark.parametrize("value, expected", [
    ("clm", CLM()),
    ("mlm", MLM(0.4, 1.0, 0.0)),
    ("mlm:0.25", MLM(0.25)),
    ({"name": "clm"}, CLM()),
    ({"name": "clm", "mask_ratio": None}, CLM()),  # as earlier versions resolved it
    ({"name": "mlm", "mask_ratio": 0.15, "mask_fraction": 0.8, "random_fraction": 0.1}, MLM(0.15, 0.8, 0.1)),
])
def test_every_way_of_writing_it(value, expected):
    objective = Objective.from_yaml(value, WHERE)
    assert objective == expected
    assert Objective.from_yaml(to_dict(objective), WHERE) == objective  # the resolved config is valid input


@pytest.mark.parametrize("value, message", [
    ("mln", "phases.1.objective.name: 'mln' is not one of clm, mlm; did you mean 'mlm'"),
    ("causal", "phases.1.objective.name: 'causal' is not one of clm, mlm"),
    ("mlm:half", "phases.1.objective: 'mlm:half': after the colon"),
    ("mlm:1.0", "phases.1.objective.mask_ratio: must be above 0 and below 1, found 1.0"),
    ("mlm:nan", "phases.1.objective.mask_ratio: must be above 0"),
    ("clm:0.4", "phases.1.objective: 'clm:0.4': clm takes no number (mask_ratio is a setting of mlm)"),
    ("mln:0.4", "phases.1.objective.name: 'mln' is not one of clm, mlm; did you mean 'mlm'"),
    (0.4, "phases.1.objective: expected clm, mlm"),
    (None, "phases.1.objective: expected clm, mlm"),
    ({"mask_ratio": 0.4}, "phases.1.objective.name: missing"),
    ({"name": ["mlm"]}, "phases.1.objective.name: ['mlm'] is not one of clm, mlm"),
    ({"name": "mlm", "mask_ratio": 0}, "phases.1.objective.mask_ratio: must be above 0"),
    ({"name": "mlm", "mask_ratio": True}, "phases.1.objective.mask_ratio: expected a number"),
    ({"name": "mlm", "maskratio": 0.4}, "phases.1.objective.maskratio: unknown key; did you mean 'mask_ratio'"),
    ({"name": "clm", "mask_fraction": 0.8}, "phases.1.objective.mask_fraction: is a setting of mlm"),
    ({"name": "mlm", "mask_fraction": -0.1}, "phases.1.objective.mask_fraction: must be from 0 to 1"),
    ({"name": "mlm", "random_fraction": 0.1}, "phases.1.objective.random_fraction: with mask_fraction 1.0"),
])
def test_a_mistake_names_its_key(value, message):
    with pytest.raises(UserError) as caught:
        Objective.from_yaml(value, WHERE)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("spelt", ["clm", "mlm:0.4", "mlm:0.25"])
def test_an_objective_is_labelled_as_the_command_line_spells_it(spelt):
    assert Objective.from_yaml(spelt, WHERE).label() == spelt


def test_berts_hiding_is_part_of_the_label():
    assert MLM(0.15, 0.8, 0.1).label() == "mlm:0.15 (mask 0.8, random 0.1)"


@pytest.mark.parametrize("size, special_ids, mask_id, message", [
    (10, {0}, 10, r"tokenizer: special token ids 0..10 are outside its vocabulary of 10"),
    (2, {0}, 1, "tokenizer: all 2 tokens are special"),
])
def test_a_vocabulary_has_ordinary_tokens(size, special_ids, mask_id, message):
    with pytest.raises(UserError, match=message):
        Vocabulary(size, frozenset(special_ids), mask_id)


def test_validation_measures_what_the_first_phase_of_each_objective_trains():
    assert evaluated([CLM(), MLM(0.3), MLM(0.1)], True) == {"clm": CLM(), "mlm": MLM(0.3)}
    assert evaluated([CLM()], True) == {"clm": CLM(), "mlm": MLM(0.4)}
    assert evaluated([CLM()], False) == {"clm": CLM()}  # nothing can be masked


@pytest.fixture
def third():
    """An objective as somebody might add one, in a file of its own: a hidden token is predicted by the one before."""
    @dataclass(frozen=True)
    class Before(Objective):
        name: ClassVar[str] = "before"
        attention: ClassVar = "bidirectional"
        predicts: ClassVar[int] = 1
        hides: ClassVar[bool] = True
        short: ClassVar = "every"

        every: int = 4

        def apply(self, sample, data_seed, vocabulary):
            hidden_N = np.arange(self.every, len(sample.tokens_S), self.every)
            inputs_S = sample.tokens_S.copy()
            inputs_S[hidden_N] = vocabulary.mask_id
            return Labelled(inputs_S, hidden_N - 1, sample.tokens_S[hidden_N])

    yield Before
    del OBJECTIVES["before"]


def test_a_third_objective_needs_nothing_but_its_file(third):
    objective = Objective.from_yaml("before:3", WHERE)
    assert objective == third(3) and objective.label() == "before:3" and to_dict(objective)["every"] == 3
    vocabulary = Vocabulary(20, frozenset({0}), 1)
    assert objective.identity(vocabulary) == {"name": "before", "every": 3, **vocabulary.identity}
    assert evaluated([objective], True) == {"before": objective, "clm": CLM(), "mlm": MLM()}
    sample = Sample(0, 0, 0, 0, np.arange(2, 12), np.array([10]))
    labelled = objective.apply(sample, 0, vocabulary)
    assert labelled.labels_N.tolist() == [5, 8, 11] and labelled.positions_N.tolist() == [2, 5, 8]
