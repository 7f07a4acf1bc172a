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
    unfused_notes,
)
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.errors import UserError

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU chooses")


@pytest.fixture
def gpu(monkeypatch):
    """The facts of a machine with a GPU, for the choices that follow from them."""
    monkeypatch.setattr(performance, "device_type", lambda: "cuda")
    monkeypatch.setattr(performance, "varlen_is_usable", lambda: True)


@on_cpu
def test_a_cpu_gets_nothing_that_only_a_gpu_is_quick_at():
    settings = PerformanceSettings()
    assert choose_attention(None, torch.float32) == choose_attention(None, torch.bfloat16) == "masked"
    assert settings.batches_ahead == 0 and not settings.on_gpu("overlap_gradients")
    assert accumulation_fusion(None, "torch") is None
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


@pytest.mark.parametrize(("heads", "length", "windows", "isolated", "words"), [
    (16, 2048, 15, False, None), (16, 2048, 16, False, "of batch.micro_size=16 (of 2048 tokens)"),
    (16, 2048, 2, True, "with 16 segments or more"), (16, 2048, 1, True, None),
    (4, 128, 8, True, None), (32, 8192, 1, False, "of batch.micro_size=1")])
def test_what_deterministic_attention_costs_is_said(heads, length, windows, isolated, words):
    notes = unfused_notes(heads, length, windows, isolated)
    assert not notes if words is None else len(notes) == 1 and words in notes[0]
