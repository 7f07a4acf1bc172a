"""Rotary embedding: the frequencies, and the scalings that released models stretch them with.

    1. `RopeScaling`              `model.rope_scaling`: the keys that Hugging Face's `rope_parameters` have
    2. `frequencies(...)`         [D/2] in fp32, and the factor on cosine and sine
    3. `rotary_angles(...)`       angles [S, D/2] of whole windows

A scaling here is a function of the config alone. `dynamic` and `longrope`, whose frequencies depend on how long the
text is, are not: isolated documents in one window would ask for several at once.

Rules: linear, arXiv 2306.15595; llama3, the reference code of Llama 3.1; yarn, arXiv 2309.00071, with transformers'
defaults. Each is computed in the order of operations of transformers, so that angles are equal to the last bit.
D is the head dimension, S a window's length.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

_NEEDS = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
          "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
_MAY = {"linear": (), "llama3": (), "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate")}


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched; which keys belong to which type is checked."""

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None

    def __post_init__(self):
        needed, allowed = _NEEDS[self.rope_type], _NEEDS[self.rope_type] + _MAY[self.rope_type]
        for name, value in vars(self).items():
            if name == "rope_type":
                continue
            if value is None and name in needed:
                raise ValueError(f"{name}: missing; rope_type {self.rope_type} needs it")
            if value is not None and name not in allowed:
                raise ValueError(f"{name}: is no key of rope_type {self.rope_type}")
            if value is not None and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name}: {value} is not positive")

    @property
    def given(self) -> dict:
        """The keys that have a value."""
        return {name: value for name, value in vars(self).items() if value is not None}


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None,
                device: torch.device | None = None) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair [D/2], fp32, and what cosine and sine are multiplied with."""
    exponents_D = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    if scaling is None:
        return 1.0 / theta**exponents_D, 1.0
    stretch = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling.rope_type]
    return stretch(theta**exponents_D, head_dim, theta, scaling)


def rotary_angles(length: int, head_dim: int, theta: float, device: torch.device,
                  scaling: RopeScaling | None = None) -> tuple[torch.Tensor, float]:
    """Angles [S, D/2] in fp32 of positions 0 .. S - 1, and the factor on cosine and sine."""
    frequencies_D, factor = frequencies(head_dim, theta, scaling, device)
    return torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies_D), factor


def _linear(powers_D, _head_dim, _theta, scaling: RopeScaling):
    return 1.0 / powers_D / scaling.factor, 1.0


def _llama3(powers_D, _head_dim, _theta, scaling: RopeScaling):
    """Short waves stay, long ones are stretched by `factor`, those between by a mixture."""
    plain_D = 1.0 / powers_D
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wave_D = 2 * math.pi / plain_D
    stretched_D = torch.where(wave_D > context / low, plain_D / scaling.factor, plain_D)
    smooth_D = (context / wave_D - low) / (high - low)
    mixed_D = (1 - smooth_D) * stretched_D / scaling.factor + smooth_D * stretched_D
    between_D = ~(wave_D < context / high) & ~(wave_D > context / low)
    return torch.where(between_D, mixed_D, stretched_D), 1.0


def _yarn(powers_D, head_dim, theta, scaling: RopeScaling):
    """Pairs that turn often within the original context stay, others are stretched; attention is sharpened."""
    context = scaling.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast or 32), pair_that_turns(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    positions_D = torch.arange(head_dim // 2, dtype=torch.float32)
    stays_D = 1 - torch.clamp((positions_D - low) / (high - low), 0, 1).to(powers_D.device)
    stretched_D, plain_D = 1.0 / (scaling.factor * powers_D), 1.0 / powers_D
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return stretched_D * (1 - stays_D) + plain_D * stays_D, attention
