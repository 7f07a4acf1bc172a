"""How an objective is named in a config, and what the table of objectives promises to the rest."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.alternate import Alternate, Turn
from megatron_encdec.objectives.base import OBJECTIVES, Labelled, Objective, Vocabulary, evaluated
from megatron_encdec.objectives.clm import CLM
from megatron_encdec.objectives.masking import Ramp
from megatron_encdec.objectives.mdlm import MDLM
from megatron_encdec.objectives.mixture import Mixture, Part
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.objectives.mntp import MNTP
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
    ({"name": "mlm", "mask_ratio": {"from": 0.3, "to": 0.05}}, MLM(Ramp(0.3, 0.05))),
    ({"name": "mlm", "unit": "span"}, MLM(unit="span", mean_span=3.0)),
    ("mntp:0.2", MNTP(0.2)),
    ("mdlm", MDLM()),
    ({"name": "alternate", "cycle": [{"objective": "clm", "steps": 4}, {"objective": "mlm:0.4", "steps": 16}]},
     Alternate((Turn(CLM(), 4), Turn(MLM(0.4), 16)))),
    ({"name": "mixture", "parts": [{"objective": "mlm", "weight": 15}, {"objective": {"name": "clm"}}]},
     Mixture((Part(MLM(), 15.0), Part(CLM(), 1.0)))),
])
def test_every_way_of_writing_it(value, expected):
    objective = Objective.from_yaml(value, WHERE)
    assert objective == expected
    assert Objective.from_yaml(to_dict(objective), WHERE) == objective  # the resolved config is valid input


@pytest.mark.parametrize("value, message", [
    ("mln", "phases.1.objective.name: 'mln' is not one of alternate, clm, mdlm, mixture, mlm, mntp; did "),
    ("causal", "phases.1.objective.name: 'causal' is not one of alternate, clm, "),
    ("mlm:half", "phases.1.objective: 'mlm:half': after the colon"),
    ("mlm:1.0", "phases.1.objective.mask_ratio: must be above 0 and below 1, found 1.0"),
    ("mlm:nan", "phases.1.objective.mask_ratio: nan is no finite number"),
    ("clm:0.4", "phases.1.objective: 'clm:0.4': clm takes no number (as mlm:0.4, mntp:0.4 do)"),
    ("mln:0.4", "phases.1.objective.name: 'mln' is not one of alternate, clm, mdlm, mixture, mlm, mntp; did "),
    (0.4, "phases.1.objective: expected alternate, clm, "),
    (None, "phases.1.objective: expected alternate, clm, "),
    ({"mask_ratio": 0.4}, "phases.1.objective.name: missing"),
    ({"name": ["mlm"]}, "phases.1.objective.name: ['mlm'] is not one of alternate, clm, "),
    ({"name": "mlm", "mask_ratio": 0}, "phases.1.objective.mask_ratio: must be above 0"),
    ({"name": "mlm", "mask_ratio": True}, "phases.1.objective.mask_ratio: expected a number"),
    ({"name": "mlm", "maskratio": 0.4}, "phases.1.objective.maskratio: unknown key; did you mean 'mask_ratio'"),
    ({"name": "clm", "mask_fraction": 0.8}, "phases.1.objective.mask_fraction: is a setting of mlm, mntp; clm has"),
    ({"name": "mlm", "mask_fraction": -0.1}, "phases.1.objective.mask_fraction: must be from 0 to 1"),
    ({"name": "mlm", "random_fraction": 0.1}, "phases.1.objective.random_fraction: with mask_fraction 1.0"),
    ({"name": "mlm", "mask_ratio": {"from": 0.3, "to": 1}}, "phases.1.objective.mask_ratio.to: must be above 0"),
    ({"name": "mlm", "mask_ratio": {"from": 0, "to": 0.3}}, "phases.1.objective.mask_ratio.from: must be above 0 and"),
    ({"name": "mlm", "mask_ratio": {"from": 0.3}}, "phases.1.objective.mask_ratio.to: missing"),
    ({"name": "mlm", "mask_ratio": "high"}, "phases.1.objective.mask_ratio: expected a number or a mapping, found"),
    ({"name": "mlm", "unit": "words"}, "phases.1.objective.unit: 'words' is not one of token, word, span; did you"),
    ({"name": "mlm", "mean_span": 3}, "phases.1.objective.mean_span: only spans have it, and unit is token; leave it"),
    ({"name": "mlm", "unit": "span", "mean_span": 0.5}, "phases.1.objective.mean_span: must be at least 1, found 0.5"),
    ({"name": "mdlm", "mask_ratio": 0.3}, "phases.1.objective.mask_ratio: is a setting of mlm, mntp; mdlm has none"),
    ("mixture", "phases.1.objective.parts: missing"),
    ({"name": "mixture", "parts": []}, "phases.1.objective.parts: empty; give at least one part, such as {objective"),
    ({"name": "alternate", "cycle": []}, "phases.1.objective.cycle: empty; give at least one part"),
    ({"name": "alternate", "cycle": [{"objective": "clm", "steps": 0}]},
     "phases.1.objective.cycle.0.steps: must be above 0, found 0"),
    ({"name": "mixture", "parts": [{"objective": "clm"}, {"objective": "mlm", "weight": -1}]},
     "phases.1.objective.parts.1.weight: must be above 0, found -1"),
    ({"name": "mixture", "parts": [{"objective": "clmm"}]},
     "phases.1.objective.parts.0.objective.name: 'clmm' is not one of"),
    ({"name": "mixture", "parts": [{"objective": {"name": "alternate", "cycle": [{"objective": "clm", "steps": 1}]}}]},
     "phases.1.objective.parts.0.objective: alternate inside mixture; parts are single objectives, such as clm or mlm"),
    ({"name": "alternate", "parts": []}, "phases.1.objective.parts: is a setting of mixture; alternate has none such"),
])
def test_a_mistake_names_its_key(value, message):
    with pytest.raises(UserError) as caught:
        Objective.from_yaml(value, WHERE)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("spelt", ["clm", "mlm:0.4", "mlm:0.25"])
def test_an_objective_is_labelled_as_the_command_line_spells_it(spelt):
    assert Objective.from_yaml(spelt, WHERE).label() == spelt


@pytest.mark.parametrize("objective, label, short", [
    (MLM(0.15, 0.8, 0.1), "mlm:0.15 (mask 0.8, random 0.1)", "mlm15"),
    (MLM(Ramp(0.3, 0.05), unit="word"), "mlm:0.3->0.05 (word)", "mlm30to5word"),
    (MNTP(0.2, unit="span"), "mntp:0.2 (span 3)", "mntp20span3"),
    (MDLM(), "mdlm", "mdlm"),
    (Mixture((Part(MLM(), 15), Part(CLM()))), "mixture (15 mlm:0.4, 1 clm)", "mixture_15mlm40_1clm"),
    (Alternate((Turn(CLM(), 4), Turn(MLM(), 16), Turn(CLM(), 4))), "alternate (4 clm, 16 mlm:0.4, 4 clm)",
     "alternate_8clm_16mlm40"),
])
def test_names_say_what_is_not_the_default(objective, label, short):
    assert (objective.label(), objective.short_name()) == (label, short)
    assert re.fullmatch(r"[A-Za-z0-9._]+", short), "part of a folder's name, in which - separates"


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
    both = Mixture((Part(MLM(Ramp(0.3, 0.1)), 15), Part(MDLM())))
    turns = Alternate((Turn(CLM(), 4), Turn(MLM(0.2), 1), Turn(MNTP(), 1)))
    assert evaluated([both, turns], True) == {"clm": CLM(), "mdlm": MDLM(), "mlm": MLM(0.3), "mntp": MNTP()}


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
