"""Whether this machine's matrix units can do FP8, and why not.

    1. `fp8_facts()`          what decides: compute capability, CUDA, Transformer Engine
    2. `fp8_refusal(...)`     reasons against a recipe on such a machine; empty where there are none
"""

from dataclasses import dataclass

import torch

from megatron_encdec.platform.device import device_type
from megatron_encdec.platform.optional import CUDA_PACKAGES, INSTALL, why_unusable

_ADA, _HOPPER = (8, 9), (9, 0)


@dataclass(frozen=True)
class Fp8Facts:
    """Lowest compute capability of the GPUs (None: there is none), CUDA that torch is built for, state of
    Transformer Engine: `usable`, `missing` or `broken (why)`."""

    capability: tuple[int, int] | None
    cuda: tuple[int, int] | None
    transformer_engine: str


def cuda_version(text: str | None) -> tuple[int, int] | None:
    """"13.0" -> (13, 0)."""
    return tuple(int(part) for part in text.split(".")[:2]) if text else None


def fp8_facts() -> Fp8Facts:
    """Of this process's device; on a CPU Transformer Engine is not looked for."""
    if device_type() == "cpu":
        return Fp8Facts(None, None, "usable")
    engine = why_unusable(CUDA_PACKAGES["transformer_engine"]) or "usable"
    return Fp8Facts(torch.cuda.get_device_capability(), cuda_version(torch.version.cuda), engine)


def fp8_refusal(recipe: str | None, facts: Fp8Facts) -> str:
    """Why `recipe` (None: any) is not possible with these `facts`; \"\" where it is.

    blockwise: its products need compute capability 9.0 and CUDA 12.9 (Transformer Engine's own check).
    """
    reasons = []
    if facts.capability is None:
        reasons.append("there is no CUDA GPU")
    elif facts.capability < _ADA:
        reasons.append("the GPU is older than compute capability 8.9 (L40, H100 and later have FP8)")
    elif recipe == "blockwise" and (facts.capability < _HOPPER or (facts.cuda or (0, 0)) < (12, 9)):
        reasons.append("blockwise scaling needs compute capability 9.0 (H100 and later) and CUDA 12.9 or later")
    if facts.transformer_engine != "usable":
        reasons.append(f"Transformer Engine is {facts.transformer_engine}: {INSTALL['transformer_engine']}")
    return " and ".join(reasons)
