"""Config of the engine: optimizer, schedule, batch, parallel sizes, checkpoints."""

from dataclasses import dataclass, field
from typing import Literal


def _positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not at least 1")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, decay on every parameter, global-norm clipping (defaults: arXiv 2507.00994)."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"lr: {self.lr} is not positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must lie in [0, 1)")
        if not self.eps > 0:
            raise ValueError(f"eps: {self.eps} is not positive")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: {self.weight_decay} is negative")
        if self.clip_grad < 0:
            raise ValueError(f"clip_grad: {self.clip_grad} is negative; 0 turns clipping off")


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate by step: linear warm-up, then `wsd` (stable, linear decay at the end), `cosine` or `constant`."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_lr: float = 0.0

    def __post_init__(self):
        for name in ("warmup_steps", "decay_steps", "final_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")


@dataclass(frozen=True)
class BatchSettings:
    """Windows of a global batch (one optimizer step) and of a micro-batch on one data-parallel rank."""

    global_size: int = 1152
    micro_size: int = 12

    def __post_init__(self):
        _positive(self, "global_size", "micro_size")
        if self.global_size % self.micro_size:
            raise ValueError(f"global_size: {self.global_size} is no multiple of batch.micro_size={self.micro_size}")


@dataclass(frozen=True)
class ParallelSettings:
    """Sizes of the tensor and pipeline groups; data parallelism takes the remaining ranks."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence: bool = False

    def __post_init__(self):
        _positive(self, "tensor", "pipeline", "context")
        if self.context > 1:
            raise ValueError(f"context: {self.context} is not supported; context parallelism is untested here, "
                             "use 1")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs parallel.tensor of 2 or more")


@dataclass(frozen=True)
class CheckpointSettings:
    """Save every `every` steps and at each phase's end; keep the newest `keep` besides those ends.

    async: write beside training, from a copy in host memory; false frees that memory and waits for the disk.
    """

    every: int = 1000
    keep: int = 2
    async_: bool = field(default=True, metadata={"key": "async"})

    def __post_init__(self):
        _positive(self, "every", "keep")
