"""Config of the engine: optimizer, schedule, batch, parallel sizes, checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from megatron_encdec.platform import schema


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, or StableAdamW (engine/stable_adamw.py), with clipping by the global norm (0: none) and weight decay on
    every parameter but the kinds in `no_decay`. Defaults: arXiv 2507.00994."""

    name: Literal["adamw", "stable_adamw"] = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    no_decay: tuple[Literal["norms", "biases", "embeddings"], ...] = ()
    clip_grad: float = 1.0

    def __post_init__(self):
        schema.above(self, 0, "lr", "eps")
        schema.at_least(self, 0, "weight_decay", "clip_grad")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must lie in [0, 1)")

    def identity(self) -> dict[str, Any]:
        """What of this determines a state, learning rates apart. What is as it always was is left out."""
        found = {key: value for key, value in schema.to_dict(self).items() if key not in ("lr", "name", "no_decay")}
        if self.name != "adamw":
            found["name"] = self.name
        return found | ({"no_decay": sorted(set(self.no_decay))} if self.no_decay else {})


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate by step: linear warm-up from 0, then `wsd` (the peak, and a decay over the last `decay_steps`),
    `cosine` (down from the end of the warm-up to the last step) or `constant`.
    decay: that of wsd, linear or 1-sqrt (arXiv 2405.18392). It ends at final_lr, or at final_fraction of the peak.
    warmup_tokens, decay_tokens: input tokens in the place of steps (`in_steps`)."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 0
    warmup_tokens: int | None = None
    decay_steps: int = 0
    decay_tokens: int | None = None
    decay: Literal["linear", "1-sqrt"] = "linear"
    final_lr: float = 0.0
    final_fraction: float | None = None

    def __post_init__(self):
        schema.at_least(self, 0, "warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens", "final_lr",
                        "final_fraction")
        for one, other in (("warmup_tokens", "warmup_steps"), ("decay_tokens", "decay_steps"),
                           ("final_fraction", "final_lr")):
            if getattr(self, one) is not None and getattr(self, other):
                raise ValueError(f"{one}: {getattr(self, one)} is given beside {other}={getattr(self, other)}; "
                                 "give one of the two")
        if (self.final_fraction or 0) > 1:
            raise ValueError(f"final_fraction: {self.final_fraction} is more than the peak; give a part of it, 0 to 1")

    def unused(self) -> list[str]:
        """Keys that were given and say nothing under this `name`."""
        of_decay = ["decay_steps", "decay_tokens"] if self.name != "wsd" else []
        of_end = ["final_lr", "final_fraction"] if self.name == "constant" else []
        return [f"{key}={value}" for key in of_decay + of_end if (value := getattr(self, key))]

    def in_steps(self, pieces: Sequence[tuple[int, int]]) -> "ScheduleSettings":
        """The same in steps alone; `pieces`: (steps, tokens of a step) of what it covers, in order. The warm-up ends
        with the first step at which so many tokens are consumed, the decay is as long counted back from the end."""
        warmup, decay = self.warmup_steps, self.decay_steps
        if self.warmup_tokens is not None:
            warmup = steps_of_tokens(self.warmup_tokens, pieces)
        if self.decay_tokens is not None:
            decay = steps_of_tokens(self.decay_tokens, pieces[::-1])
        return replace(self, warmup_steps=warmup, warmup_tokens=None, decay_steps=decay, decay_tokens=None)


def steps_of_tokens(tokens: int, pieces: Sequence[tuple[int, int]]) -> int:
    """The fewest steps that consume `tokens`, through `pieces` of (steps, tokens of a step) in order; where they do not
    suffice, the last piece goes on."""
    done = 0
    for steps, tokens_step in pieces[:-1]:
        if tokens <= steps * tokens_step:
            return done + -(-tokens // tokens_step)
        done, tokens = done + steps, tokens - steps * tokens_step
    return done + -(-tokens // pieces[-1][1])


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleSettings) -> float:
    """Learning rate of update number `step` (1 .. total_steps): a pure function, nothing to save, nothing to drift.
    schedule: in steps. The last step of a decay is done with the final rate."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    low = schedule.final_lr if schedule.final_fraction is None else peak * schedule.final_fraction
    if schedule.name == "wsd":
        remaining = total_steps - step
        if remaining < schedule.decay_steps:
            if schedule.decay == "1-sqrt":
                return low + (peak - low) * (1 - math.sqrt((schedule.decay_steps - remaining) / schedule.decay_steps))
            return low + (peak - low) * remaining / schedule.decay_steps
    elif schedule.name == "cosine":
        done = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak


@lru_cache(maxsize=64)
def learning_rates(total_steps: int, peak: float, schedule: ScheduleSettings) -> np.ndarray:
    """`learning_rate` of every update 1 .. total_steps, float64 (little-endian: it is hashed)."""
    return np.array([learning_rate(step, total_steps, peak, schedule) for step in range(1, total_steps + 1)], "<f8")


@dataclass(frozen=True)
class BatchSettings:
    """Windows of a global batch (one optimizer step) and of a micro-batch on one data-parallel rank."""

    global_size: int = 1152
    micro_size: int = 12

    def __post_init__(self):
        schema.at_least(self, 1, "global_size", "micro_size")
        if self.global_size % self.micro_size:
            raise ValueError(f"global_size: {self.global_size} is no multiple of batch.micro_size={self.micro_size}")


@dataclass(frozen=True)
class BatchRamp:
    """A batch that grows over the first `tokens` of a phase: `from`, 2 x `from`, 3 x `from` windows and so on, each for
    the same number of tokens (whole steps), until it is the phase's global_size."""

    from_: int = field(metadata={"key": "from"})
    tokens: int

    def __post_init__(self):
        if self.from_ < 1:
            raise ValueError(f"from: {self.from_} is not at least 1")
        schema.at_least(self, 1, "tokens")

    def plateaus(self, global_size: int, sequence_length: int) -> list[tuple[int, int]]:
        """(steps, windows of a step), in order, up to global_size left out."""
        count, consumed, found = global_size // self.from_ - 1, 0, []
        for number in range(1, count + 1):
            windows = number * self.from_
            wanted = self.tokens * number // count - consumed
            steps = max(1, -(-wanted // (windows * sequence_length)))
            consumed += steps * windows * sequence_length
            found.append((steps, windows))
        return found


@dataclass(frozen=True)
class BatchChange:
    """What a phase changes of the batch; sizes that are left out stay as they were. ramp: of this phase alone."""

    global_size: int | None = None
    micro_size: int | None = None
    ramp: BatchRamp | None = None

    def applied_to(self, batch: BatchSettings) -> BatchSettings:
        """`batch` with the changes. Raises ValueError where they do not fit together."""
        given = {name: value for name in ("global_size", "micro_size") if (value := getattr(self, name)) is not None}
        changed = replace(batch, **given)
        if self.ramp and (self.ramp.from_ >= changed.global_size or changed.global_size % self.ramp.from_):
            raise ValueError(f"ramp.from: {self.ramp.from_} windows do not lead up to global_size="
                             f"{changed.global_size} in equal parts; make it a divisor below it")
        if self.ramp and self.ramp.from_ % changed.micro_size:
            raise ValueError(f"ramp.from: {self.ramp.from_} is no multiple of micro_size={changed.micro_size}")
        return changed


@dataclass(frozen=True)
class ParallelSettings:
    """Sizes of the tensor and pipeline groups; data parallelism takes the remaining ranks."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence: bool = False

    def __post_init__(self):
        schema.at_least(self, 1, "tensor", "pipeline", "context")
        if self.context > 1:
            raise ValueError(f"context: {self.context} is not supported; context parallelism is untested here, use 1")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs parallel.tensor of 2 or more")


@dataclass(frozen=True)
class CheckpointSettings:
    """Save every `every` steps, at each phase's end and after the `steps`; keep the newest `keep` besides those two.
    async: write beside training, from a copy in host memory; false frees that memory and waits for the disk."""

    every: int = 1000
    keep: int = 2
    steps: list[int] = field(default_factory=list)
    async_: bool = field(default=True, metadata={"key": "async"})

    def __post_init__(self):
        schema.at_least(self, 1, "every", "keep")
        if any(step < 1 for step in self.steps):
            raise ValueError(f"steps: expected steps from 1, found {self.steps}")
