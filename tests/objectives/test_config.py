import pytest

from megatron_encdec.objectives.build import build_objective
from megatron_encdec.objectives.clm import CLM
from megatron_encdec.objectives.config import OBJECTIVES, ObjectiveConfig
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import to_dict

WHERE = "phases.1.objective"


@pytest.mark.parametrize("value, expected", [
    ("clm", ObjectiveConfig("clm")),
    ("mlm", ObjectiveConfig("mlm", 0.4, 1.0, 0.0)),
    ("mlm:0.25", ObjectiveConfig("mlm", 0.25)),
    ({"name": "clm"}, ObjectiveConfig("clm")),
    ({"name": "mlm", "mask_ratio": 0.15, "mask_fraction": 0.8, "random_fraction": 0.1},
     ObjectiveConfig("mlm", 0.15, 0.8, 0.1)),
])
def test_every_way_of_writing_it(value, expected):
    config = ObjectiveConfig.from_yaml(value, WHERE)
    assert config == expected
    assert ObjectiveConfig.from_yaml(to_dict(config), WHERE) == config  # the resolved config is valid input


@pytest.mark.parametrize("value, message", [
    ("mln", "phases.1.objective.name: 'mln' is not one of clm, mlm; did you mean 'mlm'"),
    ("mlm:half", "phases.1.objective: 'mlm:half': after the colon"),
    ("mlm:1.0", "phases.1.objective.mask_ratio: must be above 0 and below 1, found 1.0"),
    ("mlm:nan", "phases.1.objective.mask_ratio: must be above 0"),
    ("clm:0.4", "phases.1.objective.mask_ratio: is a setting of mlm"),
    (0.4, "phases.1.objective: expected clm, mlm"),
    (None, "phases.1.objective: expected clm, mlm"),
    ({"mask_ratio": 0.4}, "phases.1.objective.name: missing"),
    ({"name": "mlm", "mask_ratio": 0}, "phases.1.objective.mask_ratio: must be above 0"),
    ({"name": "mlm", "mask_ratio": True}, "phases.1.objective.mask_ratio: expected a number"),
    ({"name": "mlm", "maskratio": 0.4},
     "phases.1.objective.maskratio: unknown key; did you mean 'mask_ratio'"),
    ({"name": "clm", "mask_fraction": 0.8}, "phases.1.objective.mask_fraction: is a setting of mlm"),
    ({"name": "mlm", "mask_fraction": -0.1}, "phases.1.objective.mask_fraction: must be from 0 to 1"),
    ({"name": "mlm", "random_fraction": 0.1}, "phases.1.objective.random_fraction: with mask_fraction 1.0"),
])
def test_a_mistake_names_its_key(value, message):
    with pytest.raises(UserError) as caught:
        ObjectiveConfig.from_yaml(value, WHERE)
    assert str(caught.value).startswith(message)


def test_the_table_of_objectives_is_what_a_config_may_name():
    assert set(OBJECTIVES) >= {"clm", "mlm"}
    for name, kind in OBJECTIVES.items():
        assert type(build_objective(ObjectiveConfig.from_yaml(name, "objective"), 4, [4], 16)) is kind
    with pytest.raises(UserError, match="clm.*mlm"):
        ObjectiveConfig.from_yaml("causal", "objective")


def test_build():
    assert isinstance(build_objective(ObjectiveConfig("clm"), None, [], 10), CLM)
    mlm = build_objective(ObjectiveConfig("mlm", 0.3, 0.8, 0.1), 9, [0], 10)
    assert isinstance(mlm, MLM)
    assert (mlm.mask_ratio, mlm.mask_fraction, mlm.random_fraction, mlm.mask_id) == (0.3, 0.8, 0.1, 9)
    assert (mlm.name, mlm.attention) == ("mlm", "bidirectional")


@pytest.mark.parametrize("mask_id, special_ids, vocabulary_size, message", [
    (None, [0], 10, "tokenizer.mask_token: the tokenizer has no mask token"),
    (10, [0], 10, r"tokenizer: special token ids 0..10 are outside its vocabulary of 10"),
    (1, [0], 2, "tokenizer: all 2 tokens are special"),
])
def test_mlm_needs_a_mask_token_and_ordinary_tokens(mask_id, special_ids, vocabulary_size, message):
    with pytest.raises(UserError, match=message):
        build_objective(ObjectiveConfig("mlm"), mask_id, special_ids, vocabulary_size)
