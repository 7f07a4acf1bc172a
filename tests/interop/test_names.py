"""The name table: nothing lost, nothing mixed up, on every shape."""

from dataclasses import replace

import pytest
import torch
import transformers

from megatron_encdec.interop.names import (
    GATE_UP,
    canonical_name,
    canonical_weights,
    expand,
    split_qkv,
    to_hugging_face,
)
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.platform.errors import UserError

SHAPES = [(4, 2, 16), (9, 3, 10), (5, 1, 6), (6, 6, 4), (3, 1, 2)]  # query heads, groups, head dimension


def model_of(heads=4, groups=2, head_dim=16, tied=False, vocabulary=131):
    return ModelConfig(num_layers=3, hidden_size=heads * head_dim, ffn_hidden_size=22,
                       num_attention_heads=heads, num_query_groups=groups, head_dim=head_dim,
                       tied_embeddings=tied, vocabulary_size=vocabulary)


def hugging_face_weights(model):
    """Random tensors with the names and shapes of the stock class, which the table must agree with."""
    config = transformers.LlamaConfig(
        vocab_size=model.vocabulary_size, hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups, tie_word_embeddings=model.tied_embeddings)
    state = transformers.LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    if model.tied_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def joined(theirs, model):
    """The trunk's tensors, without the padding of the vocabulary."""
    found = {}
    for ours, names, row in expand(model):
        parts = tuple(theirs[name] for name in names)
        assert tuple(part.shape for part in parts) == row.shapes(model)
        found[ours] = row.layout.join(parts, model)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), SHAPES)
def test_there_and_back_is_equal_tensor_by_tensor(heads, groups, head_dim, tied):
    model = model_of(heads, groups, head_dim, tied)
    theirs = hugging_face_weights(model)
    back = to_hugging_face(joined(theirs, model), model)
    if tied:
        theirs.pop("lm_head.weight")
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(("heads", "groups", "head_dim"), SHAPES)
def test_rows_of_qkv_go_group_by_group(heads, groups, head_dim):
    model = model_of(heads, groups, head_dim)
    labels = []  # written out head by head, as megatron.core documents the layout
    per_group = heads // groups
    for group in range(groups):
        queries = range(group * per_group, (group + 1) * per_group)
        for part, numbers in enumerate((queries, [group], [group])):
            labels += [(part, number, row) for number in numbers for row in range(head_dim)]
    q, k, v = split_qkv(torch.tensor(labels), model)
    for part, (tensor, count) in enumerate(((q, heads), (k, groups), (v, groups))):
        assert tensor.tolist() == [[part, number, row] for number in range(count) for row in range(head_dim)]


def test_gate_comes_before_up():
    gate, up = GATE_UP.split(torch.arange(10), model_of())
    assert (gate.tolist(), up.tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_every_parameter_of_the_trunk(random_trunk, tied):
    trunk = random_trunk(tied_embeddings=tied)
    weights = canonical_weights(trunk)
    assert trunk.model.padded_vocabulary_size > trunk.model.vocabulary_size
    back = joined(to_hugging_face(weights, trunk.model), trunk.model)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        rows = trunk.model.vocabulary_size if "embedding" in name or "output_layer" in name else len(tensor)
        assert torch.equal(back[name], tensor[:rows]), name


def test_both_layer_specs_have_the_same_canonical_names():
    assert (canonical_name("decoder.layers.7.input_layernorm.weight")
            == canonical_name("decoder.layers.7.self_attention.linear_qkv.layer_norm_weight"))
    assert (canonical_name("decoder.layers.0.pre_mlp_layernorm.weight")
            == canonical_name("decoder.layers.0.mlp.linear_fc1.layer_norm_weight"))


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": True}, {"qk_norm": True, "qk_norm_over": "heads", "norm_place": "after"},
    {"norm_place": "both", "attention_output_bias": True, "qkv_bias": True, "prediction_head": "dense"}])
def test_a_trunk_has_each_name_once(changes):
    table = list(expand(replace(model_of(), **changes)))
    ours, theirs = [one for one, _, _ in table], [name for _, names, _ in table for name in names]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)


def test_what_does_not_fit_is_named():
    model = model_of()
    weights = joined(hugging_face_weights(model), model)
    with pytest.raises(UserError, match="trunk.*has no place for output_layer.weight"):
        to_hugging_face(weights, model_of(tied=True))
    del weights["decoder.final_layernorm.weight"]
    with pytest.raises(UserError, match="trunk.*lacks decoder.final_layernorm.weight"):
        to_hugging_face(weights, model)
