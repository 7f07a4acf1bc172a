"""Config of the engine: optimizer, schedule, batch, parallel sizes, checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from megatron_encdec.platform import schema
from megatron_encdec.platform.schema import key

MOST_WINDOWS = 1_000_000  # of a step or an evaluation: its micro-batches are listed before it begins
_MOST_SIZES = 10_000  # of a batch that grows: each is a stretch of the run's history


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, or StableAdamW (docs/optimizer.md). Defaults: arXiv 2507.00994."""

    name: Literal["adamw", "stable_adamw"] = key(
        "`adamw`, or `stable_adamw`, which divides a parameter's learning rate by max(1, RMS) of its update", "adamw")
    lr: float = key("the peak learning rate", 5e-4, later=schema.SAME_RATES)
    betas: tuple[float, float] = key("how slowly Adam's two averages change", (0.9, 0.95))
    eps: float = key("Adam's epsilon", 1e-5)
    weight_decay: float = key("decoupled weight decay, times the learning rate", 0.1)
    no_decay: tuple[Literal["norms", "biases", "embeddings"], ...] = key(
        "kinds of parameters without weight decay (tied embeddings: the head with them)", ())
    clip_grad: float = key("clip gradients to this global norm; 0: never", 1.0)

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
    """The learning rate of each step. `schedule` covers the whole run; that of a phase covers the phase, in its place.
    Tokens become whole steps before the run begins
    (docs/optimizer.md)."""

    name: Literal["wsd", "cosine", "constant"] = key(
        "`wsd`: warm-up, the peak, a decay at the end; `cosine`: down from the end of the warm-up to the last step; "
        "`constant`: warm-up and the peak", "wsd", later=schema.SAME_RATES)
    warmup_steps: int = key("steps in which the rate rises linearly from 0", 0, later=schema.SAME_RATES)
    warmup_tokens: int | None = key("the same in input tokens", None, later=schema.SAME_RATES)
    decay_steps: int = key("of wsd: the last steps, in which the rate goes down", 0, later=schema.SAME_RATES)
    decay_tokens: int | None = key("the same in input tokens", None, later=schema.SAME_RATES)
    decay: Literal["linear", "1-sqrt"] = key("of wsd: how it goes down (`1-sqrt`: arXiv 2405.18392)", "linear",
                                             later=schema.SAME_RATES)
    final_lr: float = key("the rate of the last step", 0.0, later=schema.SAME_RATES)
    final_fraction: float | None = key("the same as a part of the peak", None, later=schema.SAME_RATES)

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
    """How many windows are read at a time. Defaults: arXiv 2507.00994, 2.36 million tokens a step; far too many for a
    laptop."""

    global_size: int = key("windows of one optimizer step, of all ranks together", 1152)
    micro_size: int = key("windows that one rank computes at a time; fewer need less memory", 12,
                          later=schema.ANY_TIME)

    def __post_init__(self):
        schema.at_least(self, 1, "global_size", "micro_size")
        if self.global_size > MOST_WINDOWS:
            raise ValueError(f"global_size: {self.global_size:,} windows are more than a step can have "
                             f"({MOST_WINDOWS:,}); give a smaller batch")
        if self.global_size % self.micro_size:
            raise ValueError(f"global_size: {self.global_size} is no multiple of batch.micro_size={self.micro_size}")


@dataclass(frozen=True)
class BatchRamp:
    """A batch that grows at the start of a phase: `from`, 2 x `from`, 3 x `from` windows and so on, each for the same
    number of tokens (whole steps), until it is the phase's global_size."""

    from_: int = key("windows of the first steps; a divisor of global_size", name="from")
    tokens: int = key("over how many tokens the batch grows")

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
    """What a phase changes of the batch; sizes that are left out stay as they were."""

    global_size: int | None = key("windows of one optimizer step, from this phase on", None)
    micro_size: int | None = key("windows that one rank computes at a time, from this phase on; longer windows want "
                                 "fewer", None, later=schema.ANY_TIME)
    ramp: BatchRamp | None = key("let the batch grow at the start of this phase", None)

    def applied_to(self, batch: BatchSettings) -> BatchSettings:
        """`batch` with the changes. Raises ValueError where they do not fit together."""
        given = {name: value for name in ("global_size", "micro_size") if (value := getattr(self, name)) is not None}
        changed = replace(batch, **given)
        if self.ramp and (self.ramp.from_ >= changed.global_size or changed.global_size % self.ramp.from_):
            raise ValueError(f"ramp.from: {self.ramp.from_} windows do not lead up to global_size="
                             f"{changed.global_size} in equal parts; make it a divisor below it")
        if self.ramp and (sizes := changed.global_size // self.ramp.from_ - 1) > _MOST_SIZES:
            raise ValueError(f"ramp.from: {self.ramp.from_} windows lead up to {changed.global_size:,} in {sizes:,} "
                             f"sizes, more than a run can have ({_MOST_SIZES:,}); give a larger one")
        if self.ramp and self.ramp.from_ % changed.micro_size:
            raise ValueError(f"ramp.from: {self.ramp.from_} is no multiple of micro_size={changed.micro_size}")
        return changed


@dataclass(frozen=True)
class ParallelSettings:
    """How the model is cut over ranks (processes, one a GPU). Data parallelism takes the ranks that remain."""

    tensor: int = key("ranks that share each matrix (tensor parallelism)", 1, later=schema.ANY_TIME)
    pipeline: int = key("ranks that share the layers (pipeline parallelism)", 1, later=schema.ANY_TIME)
    context: int = key("ranks that share a window; 1 is the only value today", 1, later=schema.ANY_TIME)
    sequence: bool = key("with tensor parallelism: share the tokens of norms too (sequence parallelism)", False,
                         later=schema.ANY_TIME)

    def __post_init__(self):
        schema.at_least(self, 1, "tensor", "pipeline", "context")
        if self.context > 1:
            raise ValueError(f"context: {self.context} is not supported; context parallelism is untested here, use 1")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs parallel.tensor of 2 or more")


@dataclass(frozen=True)
class CheckpointSettings:
    """When the state is saved, and for how long it is kept. The end of each phase is always saved and kept."""

    every: int = key("save after so many steps, again and again", 1000, later=schema.ANY_TIME)
    keep: int = key("how many of the newest checkpoints stay; older ones are DELETED, but for the ends of phases and "
                    "`checkpoint.steps`", 2, later=schema.ANY_TIME)
    steps: list[int] = key("steps after which to save too, and whose checkpoints are kept for good", factory=list,
                           later=schema.ANY_TIME)
    async_: bool = key("write while training goes on, from a copy in host memory; false: without the copy, and "
                       "training waits", True, name="async", later=schema.ANY_TIME)

    def __post_init__(self):
        schema.at_least(self, 1, "every", "keep")
        if any(step < 1 for step in self.steps):
            raise ValueError(f"steps: expected steps from 1, found {self.steps}")
