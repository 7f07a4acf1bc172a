"""The name table: nothing lost, nothing mixed up, on every shape."""

import pytest
import torch
import transformers

from megatron_encdec.interop.names import (
    LLAMA,
    canonical_name,
    canonical_weights,
    from_hugging_face,
    split_gate_up,
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), SHAPES)
def test_there_and_back_is_equal_tensor_by_tensor(heads, groups, head_dim, tied):
    model = model_of(heads, groups, head_dim, tied)
    theirs = hugging_face_weights(model)
    ours = from_hugging_face(theirs, model)
    assert len(ours["embedding.word_embeddings.weight"]) == model.padded_vocabulary_size
    assert model.padded_vocabulary_size > model.vocabulary_size
    back = to_hugging_face(ours, model)
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
    gate, up = split_gate_up(torch.arange(10), model_of())
    assert (gate.tolist(), up.tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_every_parameter_of_the_trunk(random_trunk, tied):
    trunk = random_trunk(tied_embeddings=tied)
    weights = canonical_weights(trunk)
    back = from_hugging_face(to_hugging_face(weights, trunk.model), trunk.model)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        rows = trunk.model.vocabulary_size if "embedding" in name or "output_layer" in name else len(tensor)
        assert torch.equal(back[name][:rows], tensor[:rows]), name
        assert not back[name][rows:].any()


def test_both_layer_specs_have_the_same_canonical_names():
    assert (canonical_name("decoder.layers.7.input_layernorm.weight")
            == canonical_name("decoder.layers.7.self_attention.linear_qkv.layer_norm_weight"))
    assert (canonical_name("decoder.layers.0.pre_mlp_layernorm.weight")
            == canonical_name("decoder.layers.0.mlp.linear_fc1.layer_norm_weight"))
    assert len({row.ours for row in LLAMA.rows}) == len(LLAMA.rows)


def test_what_does_not_fit_is_named():
    model = model_of()
    weights = hugging_face_weights(model)
    without = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(UserError, match="lacks model.norm.weight"):
        from_hugging_face(without, model)
    with pytest.raises(UserError, match="has no place for model.layers.0.self_attn.q_proj.bias"):
        from_hugging_face({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, model)
    with pytest.raises(UserError, match=r"mlp.up_proj.weight: has shape \[22, 60\]"):
        from_hugging_face({**weights, "model.layers.2.mlp.up_proj.weight": torch.zeros(22, 60)}, model)
    with pytest.raises(UserError, match="lm_head.weight: differs"):
        from_hugging_face(weights, model_of(tied=True))
    with pytest.raises(UserError, match="trunk.*has no place for output_layer.weight"):
        to_hugging_face(from_hugging_face(weights, model), model_of(tied=True))
