"""Trunk and stock class compute the same, and a class with the other attention does not."""

import pytest
import torch
import torch.nn.functional as F
from check_parity import tensor_differences
from random_models import MODERNBERT

from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.hugging_face import (
    ParityError,
    build_model,
    check_logits,
    hugging_face_config,
    load_model,
    logits_difference,
    trunk_logits,
    write_model,
)
from megatron_encdec.interop.names import canonical_weights, to_hugging_face
from megatron_encdec.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


def counterpart(trunk, target, tokenizer):
    config = hugging_face_config(target, trunk.model, 32, tokenizer)
    weights = to_hugging_face(canonical_weights(trunk), trunk.model, target.family.rows)
    return config, {name: tensor.clone() for name, tensor in weights.items()}


SHAPES = {
    "odd vocabulary": {},
    "tied": {"tied_embeddings": True},
    "one group, three heads": {"hidden_size": 48, "num_attention_heads": 3, "num_query_groups": 1},
    "wide heads": {"head_dim": 24},
    "other eps and theta": {"norm_eps": 1e-2, "rope_theta": 500.0},
}


MODERN = {"num_query_groups": 4, **MODERNBERT}


@pytest.mark.parametrize(("name", "sizes"), [
    *((name, sizes) for name in ("llama", "eurobert", "llama-bidirectional") for sizes in SHAPES.values()),
    *((name, {**MODERN, **sizes}) for name in ("modernbert", "modernbert-decoder") for sizes in (
        {}, {"tied_embeddings": False, "hidden_size": 48, "num_attention_heads": 3, "num_query_groups": 3}))])
def test_logits_and_loss_are_equal(random_trunk, tokenizer, tmp_path, name, sizes):
    trunk, target = random_trunk(**sizes), TARGETS[name]
    write_model(target, *counterpart(trunk, target, tokenizer), tmp_path)
    model = load_model(target, tmp_path)  # refuses missing and unexpected keys
    assert tensor_differences(trunk, model) == []
    for windows, length in ((1, 32), (3, 17)):
        assert logits_difference(trunk, model, target.attention, windows, length) < 1e-4

        generator = torch.Generator().manual_seed(windows)
        tokens_BS = torch.randint(0, trunk.model.vocabulary_size, (windows, length), generator=generator)
        positions_N = torch.arange(2, windows * length, 5)
        labels_N = torch.arange(len(positions_N)) + trunk.model.vocabulary_size - len(positions_N)
        starts = torch.arange(0, windows * length + 1, length, dtype=torch.int32)
        context = trunk.attention_context(target.attention, starts, length, False, windows, length)
        with torch.no_grad():
            ours_N = trunk(tokens_BS, context, positions_N, labels_N)
            theirs_NV = model(tokens_BS).logits.flatten(0, 1)[positions_N]
        theirs_N = F.cross_entropy(theirs_NV, labels_N, reduction="none")
        torch.testing.assert_close(ours_N, theirs_N, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "eurobert", "llama-bidirectional", "modernbert", "modernbert-decoder"])
def test_the_other_attention_is_noticed(random_trunk, tokenizer, name):
    trunk, target = random_trunk(**(MODERN if name.startswith("modernbert") else {})), TARGETS[name]
    model = build_model(target, *counterpart(trunk, target, tokenizer))
    other = {"causal": "bidirectional", "bidirectional": "causal"}[target.attention]
    assert logits_difference(trunk, model, other, windows=1) > 0.1
    with pytest.raises(ParityError, match="the conversion is wrong"):
        check_logits(trunk, model, other)
    assert check_logits(trunk, model, target.attention) < 1e-4


def test_weights_that_are_not_numbers_are_noticed(random_trunk, tokenizer):
    trunk = random_trunk()
    with torch.no_grad():
        trunk.decoder.final_layernorm.weight[3] = float("nan")
    model = build_model(TARGETS["llama"], *counterpart(trunk, TARGETS["llama"], tokenizer))
    with pytest.raises(ParityError, match="NaN"):
        check_logits(trunk, model, "causal")


def test_a_swapped_tensor_is_named(random_trunk, tokenizer):
    trunk = random_trunk()
    config, weights = counterpart(trunk, TARGETS["llama"], tokenizer)
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    model = build_model(TARGETS["llama"], config, weights)
    assert tensor_differences(trunk, model) == [gate, up]


def test_missing_weights_are_refused(random_trunk, tokenizer):
    config, weights = counterpart(random_trunk(), TARGETS["eurobert"], tokenizer)
    weights["model.other.weight"] = weights.pop("model.norm.weight")
    expected = r"missing \['model.norm.weight'\], unexpected \['model.other.weight'\]"
    with pytest.raises(ParityError, match=expected):
        build_model(TARGETS["eurobert"], config, weights)


def test_padded_columns_are_cut(random_trunk):
    trunk = random_trunk(vocabulary_size=129)
    assert trunk.model.padded_vocabulary_size == 256
    assert trunk_logits(trunk, torch.zeros(1, 4, dtype=torch.int64), "causal").shape == (1, 4, 129)
