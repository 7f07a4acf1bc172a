"""Config of the engine: optimizer, schedule, batch, parallel sizes, checkpoints."""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from megatron_encdec.platform import schema


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, decay on every parameter, clipping by the global norm (0: none). Defaults: arXiv 2507.00994."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    def __post_init__(self):
        schema.above(self, 0, "lr", "eps")
        schema.at_least(self, 0, "weight_decay", "clip_grad")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must lie in [0, 1)")


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate by step: linear warm-up from 0, then `wsd` (the peak, and linear decay over the last
    `decay_steps`), `cosine` (down from the end of the warm-up to the last step) or `constant`."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_lr: float = 0.0

    def __post_init__(self):
        schema.at_least(self, 0, "warmup_steps", "decay_steps", "final_lr")


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleSettings) -> float:
    """Learning rate of update number `step` (1 .. total_steps): a pure function, nothing to save, nothing to drift."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    low = schedule.final_lr
    if schedule.name == "wsd":
        remaining = total_steps - step
        if remaining < schedule.decay_steps:
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
