"""FP8: which recipe a trunk and a machine can take, and what megatron.core makes of it."""

import pytest
import torch

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.performance import PerformanceSettings, core_options
from megatron_encdec.model.precision import PrecisionSettings, fp8_options, fp8_shape_problems
from megatron_encdec.model.trunk import transformer_config
from megatron_encdec.platform.device import Fp8Facts, fp8_refusal
from megatron_encdec.platform.distributed import Topology


def preset(name):
    return ModelConfig.from_yaml({"preset": name, "vocabulary_size": 128256}, "model")


@pytest.mark.parametrize("name", ["tiny", "210m", "610m", "1b"])
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_one_scale_a_tensor_takes_every_preset(name, recipe):
    assert fp8_shape_problems(preset(name), recipe, 1, 12 * 2048) == []


def test_blocks_of_128_do_not_fit_the_1b_preset_and_the_line_says_where():
    assert fp8_shape_problems(preset("210m"), "blockwise", 1, 2048) == []
    problems = fp8_shape_problems(preset("1b"), "blockwise", 1, 2048)
    assert problems[0] == "model.hidden_size is 1728, no multiple of 128"
    assert any("is 2880, no multiple of 128" in problem for problem in problems)


def test_tensor_parallel_slices_and_tokens_count():
    problems = fp8_shape_problems(preset("610m"), "current", 6, 2048 + 8)
    assert [problem.split(" is ")[1] for problem in problems] == [
        "1365, no multiple of 16", "682, no multiple of 16", "2056 tokens a rank, no multiple of 16"]
    assert "over parallel.tensor=6" in problems[0]


def core_config(precision, **sizes):
    """What megatron.core makes of it, with its own checks."""
    alone = Topology(1, 0, 1, 1, 1, 0, 0, 0)
    options = core_options(PerformanceSettings(), None) | fp8_options(precision)
    model = ModelConfig.from_yaml({"preset": "tiny", "vocabulary_size": 301, "num_layers": 6, **sizes}, "model")
    return transformer_config(model, alone, torch.bfloat16, False, options)


@pytest.mark.parametrize(("precision", "numbers", "recipe", "in_bf16"), [
    (PrecisionSettings("bf16"), None, None, set()),
    (PrecisionSettings("bf16", "delayed"), "hybrid", "delayed", set()),
    (PrecisionSettings("bf16", "current"), "hybrid", "tensorwise", set()),
    (PrecisionSettings("bf16", "current", 0, 3), "hybrid", "tensorwise", {3, 4, 5}),
    (PrecisionSettings("bf16", "blockwise", 2, 1), "e4m3", "blockwise", {0, 1, 5})])
def test_what_megatron_core_will_do(precision, numbers, recipe, in_bf16):
    """Its number format, its recipe, and which layers it leaves in bf16. That Transformer Engine has kernels for these
    is proved on a GPU alone (tests/model/test_on_gpu.py)."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = core_config(precision)
    assert config.fp8 == numbers and (recipe is None or Fp8Recipe(config.fp8_recipe) == Fp8Recipe(recipe))
    assert {layer for layer in range(6) if is_first_last_bf16_layer(config, layer)} == in_bf16
    assert not config.fp8_param and not config.fp8_dot_product_attention  # weights and attention stay in bf16
    if recipe == "delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


@pytest.mark.parametrize(("keys", "words"), [
    (dict(fp8="delayed", fp8_bf16_first=1), "fp8_bf16_first: the delayed recipe"),
    (dict(fp8_bf16_last=1), "fp8_bf16_last: 1 layers in bf16 instead of fp8, but fp8 is not set"),
    (dict(fp8="current", fp8_bf16_first=-1), "fp8_bf16_first: -1 is not at least 0"),
    (dict(dtype="fp32", fp8="current"), "dtype: fp32 and fp8 exclude each other")])
def test_keys_that_do_not_go_together(keys, words):
    with pytest.raises(ValueError, match=words):
        PrecisionSettings(**keys)


def test_what_determines_a_state_is_its_identity_and_no_more():
    assert PrecisionSettings("bf16").identity() == {"dtype": "bf16", "fp8": None}  # as runs before FP8 recorded it
    assert PrecisionSettings("bf16", fp8_evaluation=True).identity() == PrecisionSettings("bf16").identity()
    assert PrecisionSettings("bf16", "current", 1).identity() == {"dtype": "bf16", "fp8": "current",
                                                                  "fp8_bf16_first": 1}


HOPPER = Fp8Facts((9, 0), "13.0", "usable")


@pytest.mark.parametrize(("recipe", "facts", "words"), [
    ("current", HOPPER, ""), ("blockwise", HOPPER, ""), (None, HOPPER, ""),
    ("current", Fp8Facts((8, 9), "12.4", "usable"), ""),
    ("blockwise", Fp8Facts((8, 9), "13.0", "usable"), "compute capability 9.0"),
    ("blockwise", Fp8Facts((9, 0), "12.8", "usable"), "CUDA 12.9"),
    ("blockwise", Fp8Facts((9, 0), "12.9.1", "usable"), ""),
    ("delayed", Fp8Facts((8, 0), "13.0", "usable"), "older than compute capability 8.9"),
    ("delayed", Fp8Facts((9, 0), "13.0", "missing"), "Transformer Engine is missing: pip install"),
    (None, Fp8Facts(None, None, "missing"), "no CUDA GPU and Transformer Engine is missing")])
def test_what_a_machine_can_do(recipe, facts, words):
    refusal = fp8_refusal(recipe, facts)
    assert (words in refusal) if words else refusal == ""
