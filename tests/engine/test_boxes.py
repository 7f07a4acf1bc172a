"""Boxes: a flat range of a tensor as rectangles, and each rank's share of a state."""

import collections
import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trunk_states import make

from megatron_encdec.engine.boxes import Box, HostCopy, owned, pieces, tiles, wanted
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.trunk import build_trunk


@settings(deadline=None)  # the machine may be busy
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_tiles_are_the_range_and_nothing_else(data, shape):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers, covered = torch.arange(size).view(shape), []
    found = list(tiles(tuple(shape), start, stop))
    for offset, extent, position in found:
        box = numbers[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))].reshape(-1)
        assert box.tolist() == list(range(position, position + math.prod(extent)))  # contiguous, in order
        covered += box.tolist()
    assert covered == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def test_one_rank_owns_all_it_wants_and_every_tensor_is_whole(topology):
    trunk, optimizer = make(topology)
    mine, needed = owned(trunk, optimizer), wanted(trunk, optimizer)
    assert {(box.key, box.offset) for box in mine} == {(box.key, box.offset) for box in needed}
    held = {}
    for box in mine:
        held[box.key] = held.get(box.key, 0) + box.values.numel()
    assert held == {box.key: math.prod(box.shape) for box in mine}
    weights = sum(parameter.numel() for parameter in trunk.parameters())
    assert sum(held.values()) == 4 * weights  # weights, masters, two moments


def test_names_are_those_of_transformer_engine(topology):
    keys = {piece.key for piece in pieces(make(topology)[0])}
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys
    assert not [key for key in keys if "input_layernorm" in key or "_extra_state" in key]


def test_a_host_copy_is_a_copy_and_shares_what_was_shared():
    weights = torch.arange(10.0)
    boxes = [Box("weight", (10,), (0,), weights), Box("param", (10,), (0,), weights),
              Box("moment", (2, 2), (0, 0), torch.ones(2, 2, dtype=torch.bfloat16))]
    host = HostCopy(boxes)
    copies = host.take(boxes)
    weights.zero_()
    assert copies[0].values.tolist() == list(range(10)) and copies[2].values.dtype == torch.bfloat16
    assert copies[0].values.data_ptr() == copies[1].values.data_ptr()
    first = copies[0].values.data_ptr()
    assert host.take(boxes)[0].values.data_ptr() == first  # the same memory again


FEATURES = ({"norm": "layernorm"}, {"norm_place": "after"}, {"norm_place": "both"}, {"norm_zero_centered": True},
            {"embedding_norm": True}, {"activation": "geglu_tanh"}, {"prediction_head": "dense"},
            {"tied_embeddings": True}, {"qkv_bias": True}, {"attention_output_bias": True}, {"qk_norm": True},
            {"qk_norm": True, "qk_norm_over": "heads"}, {"attention_softcap": 2.0}, {"residual_multiplier": 0.5})


def test_every_tensor_is_whole_whatever_two_features_a_trunk_has(topology):
    """A stack of layers with a gap could not be written: what has none is refused when the config is read."""
    sizes = dict(num_layers=3, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2,
                 vocabulary_size=90)
    refused = []
    for one, other in itertools.combinations(FEATURES, 2):
        try:
            model = ModelConfig(**sizes, **one | other)
        except ValueError as error:
            refused.append(str(error).partition(":")[0])
            continue
        held = collections.Counter()
        found = pieces(build_trunk(model, topology, torch.float32, 8, seed=1))
        for piece in found:
            held[piece.key] += math.prod(piece.size)
        assert held == {piece.key: math.prod(piece.shape) for piece in found}, (one, other)
    assert sorted(refused) == ["embedding_norm", "norm_zero_centered"]
