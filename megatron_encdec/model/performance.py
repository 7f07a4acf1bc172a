"""How fast, never what: the config section `performance`, and what it comes to on a machine.

Nothing here changes what a run computes beyond the rounding of sums; it is no part of a run's history.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_encdec.platform import schema
from megatron_encdec.platform.device import device_type, varlen_is_usable
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import CUDA_PACKAGES, why_unusable

Attention = Literal["masked", "packed"]
_HOPPER = (9, 0)
_UNFUSED_FROM = 2**30  # segments x heads x length^2, for Transformer Engine 2.20 (get_attention_backend)


@dataclass(frozen=True)
class PerformanceSettings:
    """Left out, each is what suits the machine.

    attention: of the torch layers, `masked` windows or `packed` segments (no work between documents; a GPU needs
    bf16). head_chunk: labelled positions whose logits exist at a time. compile: torch.compile for the head's passes
    over its logits (off unless asked for). fuse_activation: SwiGLU as one kernel (on). fuse_gradients: the product
    itself adds weight gradients to the fp32 buffer (Transformer Engine, or Apex). recompute: in the backward pass,
    `mlp` or `full` layers (the first recompute_layers of a pipeline stage). overlap_gradients, overlap_parameters:
    data-parallel communication beside computation. overlap_tensor: tensor-parallel communication inside Transformer
    Engine's products (needs parallel.sequence). prefetch: micro-batches that a thread prepares ahead; 0: none."""

    attention: Attention | None = None
    head_chunk: int | None = None
    compile: bool | None = None
    fuse_activation: bool | None = None
    fuse_gradients: bool | None = None
    recompute: Literal["mlp", "full"] | None = None
    recompute_layers: int | None = None
    overlap_gradients: bool | None = None
    overlap_parameters: bool | None = None
    overlap_tensor: bool = False
    prefetch: int | None = None

    def __post_init__(self):
        schema.at_least(self, 1, "head_chunk", "recompute_layers")
        schema.at_least(self, 0, "prefetch")
        if self.recompute_layers is not None and self.recompute != "full":
            raise ValueError(f"recompute_layers: {self.recompute_layers} goes with recompute: full")
        if self.overlap_parameters and self.overlap_gradients is False:
            raise ValueError("overlap_parameters: true needs overlap_gradients, which is false")

    def on_gpu(self, name: str) -> bool:
        """The switch `name`: as set, else on for a GPU."""
        value = getattr(self, name)
        return device_type() == "cuda" if value is None else value

    @property
    def batches_ahead(self) -> int:
        """Micro-batches that a thread prepares ahead."""
        on_its_own = 2 if device_type() == "cuda" else 0
        return on_its_own if self.prefetch is None else self.prefetch


def choose_attention(wanted: Attention | None, dtype: torch.dtype) -> Attention:
    """Attention of the torch layers. A GPU is quick at packed segments; its kernels take 16 bits only."""
    packed_works = device_type() == "cpu" or (varlen_is_usable() and dtype == torch.bfloat16)
    if wanted == "packed" and not packed_works:
        raise UserError("performance.attention: packed needs a GPU of compute capability 8.0 or later and "
                        "precision.dtype=bf16; leave the key out")
    if wanted is None:
        return "packed" if device_type() == "cuda" and packed_works else "masked"
    return wanted


def accumulation_fusion(wanted: bool | None, layers: str) -> Literal["transformer_engine", "apex"] | None:
    """Who adds weight gradients to the buffer: Transformer Engine's layers themselves, megatron.core's with Apex."""
    if wanted is False or (wanted is None and device_type() == "cpu"):
        return None
    if layers == "transformer_engine":
        return "transformer_engine"
    if device_type() == "cuda" and why_unusable("fused_weight_gradient_mlp_cuda") is None:
        return "apex"
    if wanted:
        raise UserError("performance.fuse_gradients: true needs Transformer Engine's layers or Apex built with "
                        "--cuda_ext, and a GPU; leave the key out")
    return None


def core_options(settings: PerformanceSettings, fusion: str | None) -> dict[str, Any]:
    """Fields of megatron.core's TransformerConfig."""
    options = {"bias_activation_fusion": settings.fuse_activation is not False,
               "gradient_accumulation_fusion": fusion == "apex", "tp_comm_overlap": settings.overlap_tensor}
    if settings.recompute == "mlp":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    elif settings.recompute == "full":
        layers = settings.recompute_layers
        options |= {"recompute_granularity": "full", "recompute_method": "block" if layers else "uniform",
                    "recompute_num_layers": layers or 1}
    return options


def kernel_notes(layers: str, deterministic: bool, heads: int, length: int, windows: int, isolated: bool) -> list[str]:
    """A line for each kernel that is slower here than expected, in a micro-batch of `windows` x `length` tokens.
    heads: of a tensor rank. isolated: windows are cut into segments."""
    if device_type() == "cpu":
        return []
    engine, notes = why_unusable(CUDA_PACKAGES["transformer_engine"]), []
    if layers == "torch" and engine not in (None, "missing"):
        notes.append(f"Transformer Engine is installed, but {engine}: torch's layers are used")
    if layers == "transformer_engine" and deterministic and torch.cuda.get_device_capability() == _HOPPER:
        notes += unfused_notes(heads, length, windows, isolated)
    return notes


def unfused_notes(heads: int, length: int, windows: int, isolated: bool) -> list[str]:
    """Whether `run.deterministic` costs Transformer Engine its fused attention on Hopper (the backward pass would
    need more memory than there is): [] where no micro-batch has so many segments."""
    segments = -(-_UNFUSED_FROM // (heads * length**2))
    most = length * (windows - 1) + 1 if isolated else windows  # one segment as long as the window, others of one token
    if segments > most:
        return []
    when = f"with {segments} segments or more" if isolated else f"of batch.micro_size={windows}"
    return [f"run.deterministic: in micro-batches {when} (of {length} tokens) Transformer Engine leaves its fused "
            "attention for flash-attn, or where that is missing for one that is slow and keeps whole masks; "
            "a smaller batch.micro_size avoids it"]
