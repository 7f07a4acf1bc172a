"""The config of a run: every room's part put together, read from YAML and dotted overrides."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_encdec.data.config import DataChange, DataConfig
from megatron_encdec.engine.config import (
    MOST_WINDOWS,
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
from megatron_encdec.platform.schema import key
from megatron_encdec.text.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class Total:
    """The run's budget. Phases that are a `fraction` take their share of it; others have to add up to it."""

    steps: int | None = key("optimizer steps of the whole run", None, later=schema.SAME_RATES)
    tokens: int | None = key("input tokens of the whole run, rounded up to whole steps", None,
                             later=schema.SAME_RATES)

    def __post_init__(self):
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps: give run.total.steps or run.total.tokens, not both")
        schema.at_least(self, 1, "steps", "tokens")


@dataclass(frozen=True)
class From:
    """The checkpoint that a run begins with; null: random weights. `pretrain --fork RUN@STEP` sets it."""

    path: str = key("another run's directory")
    step: int | None = key("the checkpoint of that step; null: the newest", None)
    state: Literal["all", "weights"] = key(
        "`all`: go on with that run's history, counters, optimizer and data order, in a directory of its own (a fork); "
        "`weights`: a new history from the weights alone, with step 0, a fresh optimizer and data of its own "
        "(continued pretraining)", "all")

    def __post_init__(self):
        schema.at_least(self, 0, "step")


@dataclass(frozen=True)
class RunSettings:
    """Where the run lives, where it begins, how long it is, what it does in trouble."""

    dir: str = key("the run directory: config, metrics, checkpoints", later="move the directory along")
    seed: int = key("of the initial weights", 1234)
    total: Total = key("the budget", factory=Total)
    from_: From | None = key("the checkpoint to begin with", None, name="from")
    deterministic: bool = key("the same bits from the same inputs on a GPU too, at some cost; a CPU always gives them",
                              False, later=schema.ANY_TIME)
    on_nonfinite: Literal["stop", "skip"] = key("a loss or gradient norm that is NaN or infinite ends the run, or its "
                                                "step is skipped; it is never learnt from", "stop",
                                                later=schema.ANY_TIME)
    max_skipped: int = key("so many steps may be skipped", 10, later=schema.ANY_TIME)
    hang_timeout: float = key("seconds without a sign of life from a rank that end the job", 600.0,
                              later=schema.ANY_TIME)

    def __post_init__(self):
        schema.at_least(self, 0, "max_skipped")
        schema.above(self, 0, "hang_timeout")


@dataclass(frozen=True)
class PhaseSettings:
    """One phase: an objective for some of the run. Exactly one of steps, tokens, fraction gives its length. `data`,
    `rope_theta`, `rope_scaling`, `local_rope_theta`, the sizes of `batch`, `lr` and `freeze` hold until a later phase
    gives others; `batch.ramp`, `schedule` and `optimizer_state` are of this phase alone (docs/phases.md)."""

    name: str = key("what it is called in metrics and tables", later=schema.ANY_TIME)
    objective: Objective = key("what is trained: a name, a name with its ratio (`mlm:0.4`), or a mapping with the "
                               "settings below")
    steps: int | None = key("its length in optimizer steps", None)
    tokens: int | None = key("its length in input tokens, rounded up to whole steps", None)
    fraction: float | None = key("its length as a share of `run.total`", None)
    optimizer_state: Literal["carry", "reset"] = key("`reset`: Adam's averages begin anew with this phase", "carry")
    data: DataChange | None = key("what changes of the data", None)
    rope_theta: float | None = key("base of the rotary embedding from this phase on", None)
    rope_scaling: RopeScaling | bool | None = key("how the rotary embedding is stretched from this phase on; false: "
                                                  "not any more", None)
    local_rope_theta: float | None = key("base of the rotary embedding in layers with a sliding window from this phase "
                                         "on", None)
    batch: BatchChange | None = key("what changes of the batch", None)
    lr: float | None = key("the peak learning rate from this phase on", None)
    schedule: ScheduleSettings | None = key("a schedule of its own, counted in this phase's steps; null: the run's "
                                            "goes on", None)
    freeze: tuple[str, ...] | None = key("what is not trained from this phase on: `embeddings`, `layers 0-7`, `layers "
                                         "9`, `head`; []: all is trained", None)

    def __post_init__(self):
        given = [name for name in ("steps", "tokens", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"steps: phase {self.name!r} gives {' and '.join(given) or 'no length'}; "
                             "give exactly one of steps, tokens, fraction")
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError(f"name: {self.name!r} has to be a word or more, on one line")
        schema.above(self, 0, *given, "lr")
        schema.above(self, 1, "rope_theta", "local_rope_theta")
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
    """Validation, on the windows of `data.validation`: always the same ones, and at the end of each phase too."""

    every: int = key("steps from one validation to the next", 500, later=schema.ANY_TIME)
    batches: int = key("so many global batches are measured", 4, later=schema.ANY_TIME)

    def __post_init__(self):
        schema.at_least(self, 1, "every", "batches")


@dataclass(frozen=True)
class LoggingSettings:
    """What is written down while the run goes on."""

    every: int = key("steps from one train line of metrics.jsonl to the next", 1, later=schema.ANY_TIME)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = key(
        "who is told the same numbers, each a package that is needed for nothing else; []: nobody; left out: "
        "TensorBoard, where it is installed", None, later=schema.ANY_TIME)
    tensorboard: bool | None = key("the same of TensorBoard alone, from before there were others", None,
                                   later=schema.ANY_TIME)
    distance: bool = key("eval and phase lines tell how far each part of the trunk is from the weights that its phase "
                         "began with; keeps a second copy of the weights", False, later=schema.ANY_TIME)

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

    run: RunSettings = key("where the run lives, where it begins, how long it is")
    tokenizer: TokenizerConfig = key("the tokenizer that wrote the data")
    data: DataConfig = key("what the run reads")
    model: ModelConfig = key("the shape of the trunk")
    phases: list[PhaseSettings] = key("what is trained, one phase after the other")
    optimizer: OptimizerSettings = key("the optimizer", factory=OptimizerSettings)
    schedule: ScheduleSettings = key("the learning rate over the run", factory=ScheduleSettings)
    batch: BatchSettings = key("how many windows are read at a time", factory=BatchSettings)
    parallel: ParallelSettings = key("how the model is cut over ranks", factory=ParallelSettings)
    precision: PrecisionSettings = key("what the numbers are held in", factory=PrecisionSettings)
    performance: PerformanceSettings = key("speed and memory", factory=PerformanceSettings)
    checkpoint: CheckpointSettings = key("when the state is saved", factory=CheckpointSettings)
    evaluation: EvaluationSettings = key("validation", factory=EvaluationSettings)
    logging: LoggingSettings = key("what is written down", factory=LoggingSettings)

    def __post_init__(self):
        if not self.phases:
            raise ValueError("phases: empty; give at least one, e.g. [{name: mlm, objective: mlm, fraction: 1}]")
        names = [phase.name for phase in self.phases]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"phases: the name {name!r} is given {names.count(name)} times")
        if (windows := self.evaluation.batches * self.batch.global_size) > MOST_WINDOWS:
            raise ValueError(f"evaluation.batches: {self.evaluation.batches:,} times batch.global_size = {windows:,} "
                             f"windows are more than an evaluation can have ({MOST_WINDOWS:,}); give fewer")


def as_mapping(given: str | Path | Mapping[str, Any] | Config) -> dict[str, Any]:
    """The same as a mapping of its own, nothing checked."""
    if isinstance(given, (Config, Mapping)):
        return schema.to_dict(given)
    if not isinstance(given, (str, os.PathLike)):
        raise schema.unexpected("the path of a YAML file, a mapping, or a Config", given, "config")
    return schema.load_yaml(given)


def load_config(given: str | Path | Mapping[str, Any] | Config, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """A config from the YAML file at a path, from the same as a mapping, or from a `Config`; with `dotted.key=value`
    overrides. Everything is checked that the config alone can tell."""
    data = as_mapping(given)
    for override in overrides:
        schema.apply_override(data, override, Config)
    return schema.build(Config, data)
