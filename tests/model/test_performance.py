"""What the switches come to on a machine, and what cannot be had is refused by its key."""

import sys
from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from megatron_encdec.model import performance
from megatron_encdec.model.performance import (
    PerformanceSettings,
    accumulation_fusion,
    choose_attention,
    core_options,
)
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU chooses")


@pytest.fixture
def gpu(monkeypatch):
    """The facts of a machine with a GPU, for the choices that follow from them."""
    monkeypatch.setattr(performance, "device_type", lambda: "cuda")
    monkeypatch.setattr(performance, "varlen_is_usable", lambda: True)


def test_kernels_of_ours_are_for_gpus_that_have_triton(gpu, monkeypatch):
    for state in (None, "missing"):
        monkeypatch.setattr(performance, "why_unusable", lambda _name, state=state: state)
        monkeypatch.setattr(performance.importlib, "import_module", lambda name: name)
        found = PerformanceSettings().kernels()
        assert found == (None if state else "megatron_encdec.model.kernels")
        assert PerformanceSettings(triton=False).kernels() is None
    with pytest.raises(UserError, match="performance.triton: true, but Triton is missing"):
        PerformanceSettings(triton=True).kernels()


@on_cpu
def test_a_cpu_gets_nothing_that_only_a_gpu_is_quick_at():
    settings = PerformanceSettings()
    assert choose_attention(None, torch.float32) == choose_attention(None, torch.bfloat16) == "masked"
    assert settings.batches_ahead == 0 and not settings.on_gpu("overlap_gradients")
    assert accumulation_fusion(None, "torch") is None and settings.kernels() is None
    with pytest.raises(UserError, match="performance.triton: true, but Triton is of no use without a GPU"):
        PerformanceSettings(triton=True).kernels()
    options = core_options(settings, None)
    assert options["bias_activation_fusion"] and not options["gradient_accumulation_fusion"]
    assert "recompute_granularity" not in options
    with pytest.raises(UserError, match="performance.fuse_gradients: true needs"):
        accumulation_fusion(True, "torch")


def test_a_gpu_gets_packed_attention_in_16_bits(gpu, monkeypatch):
    settings = PerformanceSettings()
    assert choose_attention(None, torch.bfloat16) == "packed"
    assert choose_attention(None, torch.float32) == "masked"
    assert choose_attention("masked", torch.bfloat16) == "masked"
    with pytest.raises(UserError, match="performance.attention: packed needs .*bf16"):
        choose_attention("packed", torch.float32)
    assert settings.batches_ahead == 2 and settings.on_gpu("overlap_gradients")
    assert accumulation_fusion(None, "transformer_engine") == "transformer_engine"
    assert accumulation_fusion(False, "transformer_engine") is None
    monkeypatch.setattr(performance, "varlen_is_usable", lambda: False)
    assert choose_attention(None, torch.bfloat16) == "masked"


@pytest.mark.parametrize(("recompute", "layers", "expected"), [
    ("mlp", None, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
    ("full", None, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    ("full", 3, {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3})])
def test_recomputation_in_the_words_of_megatron_core(recompute, layers, expected):
    options = core_options(PerformanceSettings(recompute=recompute, recompute_layers=layers), None)
    assert {key: value for key, value in options.items() if key.startswith("recompute")} == expected


@pytest.mark.parametrize(("keys", "words"), [
    (dict(head_chunk=0), "head_chunk: 0 is not at least 1"),
    (dict(recompute_layers=2), "recompute_layers: 2 goes with recompute: full"),
    (dict(prefetch=-1), "prefetch: -1 is not at least 0"),
    (dict(overlap_parameters=True, overlap_gradients=False), "overlap_parameters: true needs overlap_gradients")])
def test_keys_that_do_not_go_together(keys, words):
    with pytest.raises(ValueError, match=words):
        PerformanceSettings(**keys)


@pytest.mark.parametrize("fp8", [False, True])
def test_overlap_has_buffers_for_every_precision_that_a_layer_may_be_in(monkeypatch, fp8):
    """Transformer Engine keeps its buffers by precision, and a layer whose precision has none raises KeyError."""
    modes, buffers = Enum("UserBufferQuantizationMode", ["NONE", "FP8"]), {}

    def initialize_ub(shape, tp_size, use_fp8=False, quantization_modes=None, bootstrap_backend=None):
        for mode in quantization_modes or [modes.FP8 if use_fp8 else modes.NONE]:
            buffers[mode] = (tuple(shape), tp_size, bootstrap_backend)

    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base",
                        SimpleNamespace(initialize_ub=initialize_ub, UserBufferQuantizationMode=modes))
    mcore.start_tensor_overlap(512, 64, 2, fp8)
    assert buffers == dict.fromkeys([modes.NONE, modes.FP8] if fp8 else [modes.NONE], ((512, 64), 2, "nccl"))


def test_a_key_that_is_gone_is_read_where_it_said_nothing():
    """The config.yaml of a run of before has every key, those that were left out as null."""
    assert schema.build(PerformanceSettings, {"compile": None, "prefetch": 1}) == PerformanceSettings(prefetch=1)
    with pytest.raises(UserError, match=r"performance.compile: is gone; .*performance.triton"):
        schema.build(PerformanceSettings, {"compile": True}, "performance")
