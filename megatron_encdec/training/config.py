"""The config of a run: every room's part put together, read from YAML and dotted overrides."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_encdec.data.config import DataChange, DataConfig
from megatron_encdec.engine.config import (
    BatchChange,
    BatchSettings,
    CheckpointSettings,
    OptimizerSettings,
    ParallelSettings,
    ScheduleSettings,
)
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.parts import Frozen
from megatron_encdec.model.performance import PerformanceSettings
from megatron_encdec.model.precision import PrecisionSettings
from megatron_encdec.model.rope import RopeScaling
from megatron_encdec.objectives.base import Objective
from megatron_encdec.platform import schema
from megatron_encdec.text.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class Total:
    """The run's budget: optimizer steps, or input tokens (rounded up to whole steps)."""

    steps: int | None = None
    tokens: int | None = None

    def __post_init__(self):
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps: give run.total.steps or run.total.tokens, not both")
        schema.at_least(self, 1, "steps", "tokens")


@dataclass(frozen=True)
class From:
    """The checkpoint that a run begins with (step left out: the newest of the run at `path`).
    state: `all` continues that run's history, counters and data order in a directory of its own (a fork); `weights`
    begins a new history from the weights alone: step 0, fresh optimizer, its own data (continued pretraining)."""

    path: str
    step: int | None = None
    state: Literal["all", "weights"] = "all"

    def __post_init__(self):
        schema.at_least(self, 0, "step")


@dataclass(frozen=True)
class RunSettings:
    """Where the run lives, where it begins, the seed of its initial weights, its budget, what it does in trouble.
    on_nonfinite: a loss or gradient norm that is nan or infinite ends the run, or its step is skipped, at most
    `max_skipped` times. hang_timeout: seconds without a sign of life from a rank that end the job."""

    dir: str
    seed: int = 1234
    total: Total = field(default_factory=Total)
    from_: From | None = field(default=None, metadata={"key": "from"})
    deterministic: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    hang_timeout: float = 600.0

    def __post_init__(self):
        schema.at_least(self, 0, "max_skipped")
        schema.above(self, 0, "hang_timeout")


@dataclass(frozen=True)
class PhaseSettings:
    """One phase: an objective for some of the run. Exactly one of steps, tokens, fraction gives its length.

    data, rope_theta, rope_scaling (false: none), the sizes of batch, lr (the peak learning rate), freeze (what is not
    trained: `Frozen`; [] frees all): from here on, until a later phase gives others. batch.ramp, schedule,
    optimizer_state: of this phase alone.
    """

    name: str
    objective: Objective
    steps: int | None = None
    tokens: int | None = None
    fraction: float | None = None
    optimizer_state: Literal["carry", "reset"] = "carry"
    data: DataChange | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | bool | None = None
    batch: BatchChange | None = None
    lr: float | None = None
    schedule: ScheduleSettings | None = None
    freeze: tuple[str, ...] | None = None

    def __post_init__(self):
        given = [name for name in ("steps", "tokens", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"steps: phase {self.name!r} gives {' and '.join(given) or 'no length'}; "
                             "give exactly one of steps, tokens, fraction")
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError(f"name: {self.name!r} has to be a word or more, on one line")
        schema.above(self, 0, *given, "lr")
        schema.above(self, 1, "rope_theta")
        if self.rope_scaling is True:
            raise ValueError("rope_scaling: true says nothing; give {rope_type, factor, ...}, or false for none")
        if self.fraction is not None and self.fraction > 1:
            raise ValueError(f"fraction: {self.fraction} is more than the whole run")
        try:
            Frozen.parse(self.freeze or ())
        except ValueError as error:
            raise ValueError(f"freeze: {error}") from None


@dataclass(frozen=True)
class EvaluationSettings:
    """Validation every `every` steps and at each phase's end, on `batches` global batches, always the same ones."""

    every: int = 500
    batches: int = 4

    def __post_init__(self):
        schema.at_least(self, 1, "every", "batches")


@dataclass(frozen=True)
class LoggingSettings:
    """A train line in metrics.jsonl every `every` steps. trackers: who is told the same numbers, each a package that is
    needed for nothing else; left out: TensorBoard, where it is installed; []: nobody. tensorboard: the same of
    TensorBoard alone, from before there were others. distance: eval and phase lines tell how far each part of the trunk
    is from the weights that its phase began with."""

    every: int = 1
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = None
    tensorboard: bool | None = None
    distance: bool = False

    def __post_init__(self):
        schema.at_least(self, 1, "every")
        names, listed = self.trackers, "tensorboard" in (self.trackers or ())
        if self.tensorboard is False and listed:
            raise ValueError("tensorboard: false, but logging.trackers names it; leave logging.tensorboard out")
        if self.tensorboard is False and names is None:
            names = ()
        if self.tensorboard and names is not None and not listed:
            names = ("tensorboard", *names)
        object.__setattr__(self, "trackers", names and tuple(dict.fromkeys(names)))
        object.__setattr__(self, "tensorboard", None)


@dataclass(frozen=True)
class Config:
    """A whole run. The resolved form, `config.yaml` in the run directory, is itself a valid input."""

    run: RunSettings
    tokenizer: TokenizerConfig
    data: DataConfig
    model: ModelConfig
    phases: list[PhaseSettings]
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    performance: PerformanceSettings = field(default_factory=PerformanceSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def __post_init__(self):
        if not self.phases:
            raise ValueError("phases: empty; give at least one, e.g. [{name: mlm, objective: mlm, fraction: 1}]")
        names = [phase.name for phase in self.phases]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"phases: the name {name!r} is given {names.count(name)} times")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read the YAML at `path`, apply `dotted.key=value` overrides, check everything a file alone can tell."""
    data = schema.load_yaml(path)
    for override in overrides:
        schema.apply_override(data, override, Config)
    return schema.build(Config, data)
