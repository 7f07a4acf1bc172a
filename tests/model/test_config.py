"""Shapes of the presets are the paper's."""

import pytest

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.platform.errors import UserError


@pytest.mark.parametrize(("preset", "millions", "head_dim"), [("210m", 212, 64), ("610m", 608, 64), ("1b", 1188, 96)])
def test_presets_have_the_papers_parameter_counts(preset, millions, head_dim):
    model = ModelConfig.from_yaml({"preset": preset, "vocabulary_size": 128256}, "model")
    assert round(model.parameter_count(with_head=False) / 1e6) == millions
    assert model.head_dim == head_dim
    assert model.padded_vocabulary_size == 128256  # a multiple already


def test_overrides_and_mistakes():
    assert ModelConfig.from_yaml({"preset": "tiny", "num_layers": 6}, "model").num_layers == 6
    for value, words in [("tinny", "tinny"), ({"preset": "tiny", "hidden": 3}, "did you mean 'hidden_size'"),
                         ({"preset": "tiny", "num_query_groups": 3}, "model.num_query_groups: 3 does not divide")]:
        with pytest.raises(UserError, match=words):
            ModelConfig.from_yaml(value, "model")


def test_padding_is_the_same_for_every_tensor_parallel_size():
    model = ModelConfig.from_yaml({"preset": "610m", "vocabulary_size": 8191}, "model")
    assert model.padded_vocabulary_size >= 8191
    assert all(model.padded_vocabulary_size % tensor == 0 for tensor in (1, 2, 3, 6))
