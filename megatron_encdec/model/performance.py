"""How fast, never what: the config section `performance`, and what it comes to on a machine.

Nothing here changes what a run computes beyond the rounding of sums; it is no part of a run's history.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch

from megatron_encdec.platform import schema
from megatron_encdec.platform.device import device_type, varlen_is_usable
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import CUDA_PACKAGES, why_unusable

Attention = Literal["masked", "packed"]


def _key(meaning: str) -> Any:
    return schema.key(meaning, None, later=schema.ANY_TIME)


@dataclass(frozen=True)
class PerformanceSettings:
    """What changes speed and memory, and no result beyond the rounding of sums. Left out, each key is what suits the
    machine (docs/gpu.md)."""

    attention: Attention | None = _key("of torch's layers: `masked` windows, or `packed` segments, which spend nothing "
                                       "on pairs of documents (on a GPU it needs bf16)")
    head_chunk: int | None = _key("labelled positions whose logits exist at a time; fewer need less memory")
    triton: bool | None = _key("our Triton kernels for rotary embeddings, SwiGLU and the head's passes over its "
                               "logits; on a GPU that has Triton unless set")
    fuse_activation: bool | None = _key("the MLP's gated unit as one function; false: as three")
    fuse_gradients: bool | None = _key("the product itself adds weight gradients to the fp32 buffer (Transformer "
                                       "Engine, or Apex)")
    recompute: Literal["mlp", "full"] | None = _key("compute activations again in the backward pass and keep fewer: of "
                                                    "`mlp`, or of `full` layers")
    recompute_layers: int | None = _key("with `full`: only the first layers of a pipeline stage, so many")
    overlap_gradients: bool | None = _key("data-parallel gradients travel while the rest is computed; on a GPU unless "
                                          "set")
    overlap_parameters: bool | None = _key("updated parameters travel while the next step begins; on a GPU unless set")
    overlap_tensor: bool = schema.key("tensor-parallel communication inside Transformer Engine's products; needs "
                                      "parallel.sequence", False, later=schema.ANY_TIME)
    prefetch: int | None = _key("micro-batches that a thread prepares ahead; null: 2 on a GPU, 0 on a CPU")

    RETIRED: ClassVar = {"compile": "the head has Triton's kernels on a GPU (performance.triton); leave the key out"}

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

    def kernels(self) -> ModuleType | None:
        """`model/kernels.py`, or None where torch's operators do the same."""
        state = "of no use without a GPU" if device_type() == "cpu" else why_unusable("triton")
        if self.triton and state:
            raise UserError(f"performance.triton: true, but Triton is {state}; leave the key out")
        if state or self.triton is False:
            return None
        return importlib.import_module("megatron_encdec.model.kernels")

    @property
    def batches_ahead(self) -> int:
        """Micro-batches that a thread prepares ahead."""
        on_its_own = 2 if device_type() == "cuda" else 0
        return on_its_own if self.prefetch is None else self.prefetch


def choose_attention(wanted: Attention | None, dtype: torch.dtype, softcap: float | None = None) -> Attention:
    """Attention of the torch layers. A GPU is quick at packed segments; its kernels take 16 bits only, and bound no
    scores (softcap: `model.attention_softcap`)."""
    if softcap and device_type() == "cuda":
        if wanted == "packed":
            raise UserError(f"performance.attention: packed has no kernel for model.attention_softcap={softcap}; leave "
                            "the key out")
        return "masked"
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


def kernel_notes(layers: str) -> list[str]:
    """A line for each kernel that is not used here, though it is installed."""
    engine = why_unusable(CUDA_PACKAGES["transformer_engine"]) if device_type() == "cuda" else None
    if layers == "torch" and engine not in (None, "missing"):
        return [f"Transformer Engine is installed, but {engine}: torch's layers are used"]
    return []
