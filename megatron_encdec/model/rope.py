"""Rotary embedding: the frequencies, and the scalings that released models stretch them with.

    1. `RopeScaling`          a scaling, and which keys belong to it
    2. `frequencies(...)`     of each pair of a head's dimensions, stretched by it
    3. `rotary_angles(...)`   position x frequency, for a window

A scaling here is a function of the config alone. `dynamic` and `longrope`, whose frequencies depend on how long the
text is, are not: isolated documents in one window would ask for several at once.

Rules: linear, arXiv 2306.15595; llama3, the reference code of Llama 3.1; yarn, arXiv 2309.00071, with transformers'
defaults. Each is computed in the order of operations of transformers' ROPE_INIT_FUNCTIONS, to the last bit
(tests/model/test_rope.py). Those are not called: they take a whole PretrainedConfig, and importing transformers would
cost every rank 5.8 s of CPU and 107 MiB.
D is the head dimension, S a window's length.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_encdec.platform import schema

_NEEDS = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
          "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
_MAY = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate")}


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of the rotary embedding are stretched, under the names of Hugging Face configs; which keys
    belong to which type is checked."""

    rope_type: Literal["linear", "llama3", "yarn"] = schema.key("the rule")
    factor: float | None = schema.key("how much longer the context becomes", None)
    low_freq_factor: float | None = schema.key("of llama3: longer waves are stretched by the whole factor", None)
    high_freq_factor: float | None = schema.key("of llama3: shorter waves are not stretched", None)
    original_max_position_embeddings: int | None = schema.key("of llama3 and yarn: the context before", None)
    attention_factor: float | None = schema.key("of yarn: scales queries and keys; null: by its rule", None)
    beta_fast: float | None = schema.key("of yarn: pairs that turn more often within the context stay; null: 32", None)
    beta_slow: float | None = schema.key("of yarn: pairs that turn less often are stretched whole; null: 1", None)
    truncate: bool | None = schema.key("of yarn: round the borders between these to whole pairs; null: true", None)

    def __post_init__(self):
        kind, given = self.rope_type, [name for name in self.given if name != "rope_type"]
        for name in _NEEDS[kind]:
            if name not in given:
                raise ValueError(f"{name}: missing; rope_type {kind} needs it")
        for name in given:
            if name not in (*_NEEDS[kind], *_MAY.get(kind, ())):
                raise ValueError(f"{name}: is no key of rope_type {kind}")
        schema.above(self, 0, *(name for name in given if name != "truncate"))
        if kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"low_freq_factor: {self.low_freq_factor} is not below high_freq_factor="
                             f"{self.high_freq_factor}")
        if kind == "yarn" and not self.turns[1] < self.turns[0]:
            raise ValueError(f"beta_slow: {self.turns[1]} is not below beta_fast={self.turns[0]}")

    @property
    def turns(self) -> tuple[float, float]:
        """Of yarn, within the original context: pairs that turn more often than the first stay, those that turn less
        often than the second are stretched."""
        return self.beta_fast or 32, self.beta_slow or 1

    @property
    def given(self) -> dict:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Rope:
    """Base and scaling of the rotary embedding; local_theta: base in layers with a sliding window, without a scaling
    there; None: as in the others."""

    theta: float
    scaling: RopeScaling | None = None
    local_theta: float | None = None

    @property
    def of_windows(self) -> "Rope":
        """In layers with a sliding window."""
        return self if self.local_theta is None else Rope(self.local_theta, None, self.local_theta)

    def identity(self) -> dict:
        """Its part of a run's history."""
        return {"rope_theta": self.theta, **({"rope_scaling": self.scaling.given} if self.scaling else {}),
                **({"local_rope_theta": self.local_theta} if self.local_theta is not None else {})}


def rotary_angles(length: int, head_dim: int, theta: float, device: torch.device,
                  scaling: RopeScaling | None = None) -> tuple[torch.Tensor, float]:
    """Angles [S, D/2] in fp32 of positions 0 .. S - 1, and the factor on cosine and sine."""
    frequencies_D, factor = frequencies(head_dim, theta, scaling, device)
    return torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies_D), factor


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None,
                device: torch.device | None = None) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair [D/2] in fp32, and the factor on cosine and sine."""
    powers_D = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is None:
        return 1.0 / powers_D, 1.0
    if scaling.rope_type == "linear":
        return 1.0 / powers_D / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(1.0 / powers_D, scaling), 1.0
    return _yarn(powers_D, head_dim, theta, scaling)


def _llama3(plain_D, scaling: RopeScaling):
    """Short waves stay, long ones are stretched by `factor`, those between by a mixture."""
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wave_D = 2 * math.pi / plain_D
    stretched_D = torch.where(wave_D > context / low, plain_D / scaling.factor, plain_D)
    smooth_D = (context / wave_D - low) / (high - low)
    mixed_D = (1 - smooth_D) * stretched_D / scaling.factor + smooth_D * stretched_D
    between_D = ~(wave_D < context / high) & ~(wave_D > context / low)
    return torch.where(between_D, mixed_D, stretched_D)


def _yarn(powers_D, head_dim: int, theta: float, scaling: RopeScaling):
    """Pairs that turn often within the original context stay, others are stretched; attention is sharpened."""
    context = scaling.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = map(pair_that_turns, scaling.turns)
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
