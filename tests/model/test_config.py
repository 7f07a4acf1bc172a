"""Shapes of the presets are the paper's."""

import pytest
import torch
import transformers

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


def test_a_run_can_stand_in_the_place_of_a_preset(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model: {preset: null, num_layers: 3, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4,\n"
        "        num_query_groups: 2, qkv_bias: true, vocabulary_size: 301,\n"
        "        rope_scaling: {rope_type: linear, factor: 2}}\n")
    model = ModelConfig.from_yaml({"run": str(tmp_path), "layers": "torch"}, "model")
    assert (model.num_layers, model.qkv_bias, model.rope_scaling.factor, model.layers) == (3, True, 2.0, "torch")
    with pytest.raises(UserError, match="model.run: .*no config.yaml"):
        ModelConfig.from_yaml({"run": str(tmp_path / "none")}, "model")


def test_what_a_trunk_does_without_is_no_part_of_its_identity():
    plain = dict(preset="tiny", vocabulary_size=301)
    before = ModelConfig.from_yaml(plain, "model").identity()
    assert not before.keys() & {"qkv_bias", "qk_norm", "rope_scaling", "layers_without_rope", "sliding_window",
                                 "layers_without_window", "family", "preset", "norm", "activation", "embedding_norm",
                                 "prediction_head", "local_rope_theta"}
    same = ModelConfig.from_yaml({**plain, "family": "mistral", "max_positions": 99, "layers": "torch"}, "model")
    assert same.identity() == before
    for key, value in (("qk_norm", True), ("layers_without_rope", [1]),
                       ("rope_scaling", {"rope_type": "linear", "factor": 2.0}), ("norm", "layernorm"),
                       ("activation", "geglu"), ("embedding_norm", True), ("prediction_head", "dense")):
        assert ModelConfig.from_yaml({**plain, key: value}, "model").identity()[key] == value
    with pytest.raises(UserError, match="layers_without_rope: 4 is not one of the layers 0..3"):
        ModelConfig.from_yaml({**plain, "layers_without_rope": [4]}, "model")


def test_sliding_windows_are_part_of_the_identity_where_they_are():
    model = ModelConfig.from_yaml({"preset": "tiny", "vocabulary_size": 301, "sliding_window": 8,
                                   "layers_without_window": [0, 2]}, "model")
    assert model.layers_with_window == [1, 3]
    assert (model.identity()["sliding_window"], model.identity()["layers_without_window"]) == (8, [0, 2])
    for changes, words in (({"sliding_window": 0}, "sliding_window"),
                           ({"sliding_window": None}, "no layer has a window"),
                           ({"layers_without_window": [4]}, "layers_without_window: 4 is not one of the layers 0..3"),
                           ({"layers_without_window": [3, 2, 1, 0]}, "all layers are named")):
        with pytest.raises(UserError, match=words):
            ModelConfig.from_yaml({"preset": "tiny", "vocabulary_size": 301, "sliding_window": 8,
                                   "layers_without_window": [0, 2], **changes}, "model")


# JHU-CLSP/ettin-encoder-vs-decoder, pretraining/configs/standard: layers, width, MLP, heads of 64
ETTIN = {"17m": (7, 256, 384, 4), "32m": (10, 384, 576, 6), "68m": (19, 512, 768, 8), "150m": (22, 768, 1152, 12),
         "400m": (28, 1024, 2624, 16), "1b": (28, 1792, 3840, 28)}


@pytest.mark.parametrize("size", ETTIN)
def test_ettins_presets_are_modernberts_shape_in_its_sizes(size):
    layers, width, inner, heads = ETTIN[size]
    ours = ModelConfig.from_yaml({"preset": f"ettin-{size}", "vocabulary_size": 50368}, "model")
    assert ours.head_dim == 64
    config = transformers.ModernBertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads)
    with torch.device("meta"):
        theirs = transformers.ModernBertForMaskedLM(config)
    assert ours.parameter_count() == sum(one.numel() for one in theirs.parameters())
    assert [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"] == (
        ours.layers_without_window)
    assert (ours.sliding_window, ours.norm_eps) == (config.sliding_window, config.norm_eps)
    assert (ours.rope_theta, ours.local_rope_theta) == (160000.0, 160000.0)


def test_a_preset_with_windows_can_be_made_smaller():
    small = ModelConfig.from_yaml({"preset": "ettin-150m", "num_layers": 4, "vocabulary_size": 301}, "model")
    assert (small.num_layers, small.layers_without_window) == (4, [0, 3])
    heads = ModelConfig.from_yaml({"preset": "ettin-17m", "num_attention_heads": 8}, "model")
    assert (heads.num_query_groups, heads.head_dim) == (8, 32)
    assert ModelConfig.from_yaml({"preset": "ettin-17m", "num_layers": 1}, "model").layers_with_window == []
    whole = ModelConfig.from_yaml({"preset": "ettin-17m", "sliding_window": None, "vocabulary_size": 301}, "model")
    assert not whole.layers_with_window and whole.local_rope_theta is None
    with pytest.raises(UserError, match="model.local_rope_theta: no layer has a window"):
        ModelConfig.from_yaml({"preset": "tiny", "local_rope_theta": 1e4}, "model")
