"""Initial weights depend on seed, name and global position alone."""

import numpy as np
import pytest
import torch
from random_models import MODERNBERT

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.trunk import build_trunk, normal_slice


def test_a_slice_is_cut_from_the_whole():
    shape = (700, 40)
    whole = normal_slice(1, "w", shape, (0, 0), shape)
    assert np.array_equal(normal_slice(1, "w", shape, (250, 10), (300, 20)), whole[250:550, 10:30])
    assert not np.array_equal(whole, normal_slice(2, "w", shape, (0, 0), shape))
    assert not np.array_equal(whole, normal_slice(1, "v", shape, (0, 0), shape))
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02


@pytest.mark.parametrize("shape", [{}, MODERNBERT], ids=["plain", "modernbert"])
def test_every_parameter_is_filled(topology, shape):
    model = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
                        vocabulary_size=500, **shape)
    trunks = [build_trunk(model, topology, torch.float32, 16, seed) for seed in (1, 1, 2)]
    drawn = []
    for (name, first), (_, same), (_, other) in zip(*(trunk.named_parameters() for trunk in trunks), strict=True):
        assert torch.equal(first, same)
        if first.dim() == 1:
            assert (first == (0.0 if name.endswith(".bias") else 1.0)).all(), name
        else:
            assert abs(first.std().item() / 0.02 - 1) < 0.05, name
            assert not torch.equal(first, other), name
            drawn.append(first.flatten()[:8].tolist())
    assert len({tuple(values) for values in drawn}) == len(drawn)  # no two matrices start alike
