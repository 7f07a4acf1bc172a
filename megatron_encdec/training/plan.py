"""The plan of a run: what it is, apart from the machine that it runs on.

    1. `resolve(config)`                       config, tokenizer and data -> `Plan`: all that identifies the run
    2. `check_topology`, `check_kernels`       whether so many ranks, and this machine's devices, can do it
    3. `definite(run)`, `beginning(config)`    `run.from`: which step a run begins with, and what of it is history
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from megatron_encdec.data.samples import Samples
from megatron_encdec.data.training_data import TrainingData
from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.checkpoint import RunState, read_run_state
from megatron_encdec.model.config import choose_layers
from megatron_encdec.model.performance import accumulation_fusion, choose_attention, kernel_notes
from megatron_encdec.model.precision import fp8_shape_problems
from megatron_encdec.objectives.base import Objective, Vocabulary, evaluated
from megatron_encdec.platform import schema
from megatron_encdec.platform.device import bf16_is_native, fp8_facts, fp8_refusal
from megatron_encdec.platform.distributed import check_parallel_sizes
from megatron_encdec.platform.errors import WARNING, UserError
from megatron_encdec.platform.ranks import RankEnvironment
from megatron_encdec.text.tokenizer import Tokenizer, load_tokenizer, require_mask
from megatron_encdec.training.config import Config, From, RunSettings
from megatron_encdec.training.layout import batches, declarations, lay_out, with_phase_steps
from megatron_encdec.training.sources import missing_sources, open_train, open_validation
from megatron_encdec.training.stretches import Stretch, Timeline
from megatron_encdec.training.work import Work

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ASSUMED_VOCABULARY = 128_256  # the Llama 3 tokenizer's (arXiv 2507.00994), while there is none


@dataclass(frozen=True)
class Plan:
    """A run as its config, tokenizer and data determine it. evaluated: objective name -> what validation measures."""

    config: Config
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    train: TrainingData
    validation: Samples | None
    timeline: Timeline
    evaluated: dict[str, Objective]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.precision.dtype]

    def work(self, step: int) -> Work:
        """What update `step` reads."""
        stretch = self.timeline.at(step)
        numbers = stretch.samples(step)
        return Work(self.train.of(numbers.start), stretch.objective_at(step), numbers, stretch.micro_size, stretch.rope)

    def validation_work(self, objective: Objective, stretch: Stretch) -> Work:
        """What validation reads in `stretch`: always the same windows, of the length that `data` says."""
        batch = self.config.batch
        return Work(self.validation, objective, range(self.config.evaluation.batches * batch.global_size),
                    batch.micro_size, stretch.rope)

    @property
    def notes(self) -> list[str]:
        """What the user should know of data and kernels before the first step."""
        model = self.config.model
        kernels = kernel_notes(choose_layers(model.layers, self.dtype, model.attention_softcap))
        validation = self.validation.notes(0) if self.validation else []
        notes = self.train.notes() + self._large_steps() + validation + self._unused() + kernels
        return sorted(notes, key=lambda note: not note.startswith(WARNING))  # what may be a mistake comes first

    def _large_steps(self) -> list[str]:
        """Warnings of phases in which one step reads more windows than its sources have."""
        found = {}
        for stretch in self.timeline.stretches:
            part = self.train.of(stretch.first_sample)
            if stretch.batch_size > part.len_windows:
                found[stretch.train_key] = (
                    f"{WARNING}batch.global_size: one step of {stretch.batch_size:,} windows of "
                    f"{stretch.data.sequence_length:,} tokens reads all {part.len_windows:,} windows of "
                    f"{stretch.train_key} {stretch.batch_size / part.len_windows:,.1f} times; give a smaller "
                    "batch.global_size, a smaller data.sequence_length, or more text")
        return list(found.values())

    def _unused(self) -> list[str]:
        """Keys of schedules that change nothing."""
        given = {"schedule": self.config.schedule, **{f"phases.{index}.schedule": phase.schedule
                                                      for index, phase in enumerate(self.config.phases)}}
        return [f"{where}: {', '.join(keys)} changes nothing under {schedule.name}"
                for where, schedule in given.items() if schedule and (keys := schedule.unused())]


def make_plan(config: Config, world_size: int | None = None) -> Plan:
    """The plan of `config` on this machine; every mistake that can be seen before training starts is a `UserError`."""
    check_topology(config, RankEnvironment.read().world_size if world_size is None else world_size)
    plan = resolve(config)
    check_kernels(plan.config)
    return plan


def resolve(config: Config) -> Plan:
    """`config` with all that it leaves open filled in from tokenizer, data and earlier checkpoints.
    The one thing that depends on the machine is `precision.dtype`, where it is left out."""
    stretches = lay_out(config)
    objectives = [stretch.objective for stretch in stretches]
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.mask_token, config.tokenizer.eod_token)
    if any(objective.hides for objective in objectives):
        require_mask(tokenizer)
    train = TrainingData(declarations(stretches), open_train(config))
    validation = Samples(config.data, "validation", stores=open_validation(config)) if config.data.validation else None
    for store in [*train.stores, *(validation.stores if validation else [])]:
        if store.tokenizer:
            tokenizer.check_wrote(store.prefix, store.tokenizer.fingerprint, "tokenizer.path")
    config, vocabulary = _filled_in(config, tokenizer), Vocabulary.of(tokenizer)
    for index, phase in enumerate(config.phases):
        phase.objective.check(vocabulary, f"phases.{index}.objective")
    timeline = Timeline(lay_out(config), beginning(config), config.model.identity(), train.fingerprints, vocabulary)
    return Plan(config, tokenizer, vocabulary, train, validation, timeline,
                evaluated(objectives, tokenizer.mask_id is not None))


def missing_inputs(config: Config) -> list[str]:
    """A line for the tokenizer, the run begun from and each source of `config` that is needed and not there."""
    inputs = [("tokenizer.path", config.tokenizer.path)]
    if config.run.from_ and config.run.from_.path:
        inputs.append(("run.from.path", config.run.from_.path))
    missing = [(key, path) for key, path in inputs if not Path(path).exists()]
    return [f"{key}: {path}" for key, path in [*missing, *missing_sources(config)]]


def _filled_in(config: Config, tokenizer: Tokenizer) -> Config:
    given = config.model.vocabulary_size
    if given is not None and given < tokenizer.vocabulary_size:  # released models often have rows to spare
        raise UserError(f"model.vocabulary_size: {given}, but the tokenizer {config.tokenizer.path} has "
                        f"{tokenizer.vocabulary_size} tokens; leave the key out")
    config = replace(with_dtype(config), run=replace(config.run, from_=definite(config.run)),
                     model=replace(config.model, vocabulary_size=given or tokenizer.vocabulary_size))
    return with_phase_steps(config, lay_out(config))


def with_dtype(config: Config) -> Config:
    """`config` with `precision.dtype`: the one given, else what this machine's devices are good at."""
    dtype = config.precision.dtype or ("bf16" if bf16_is_native() or config.precision.fp8 else "fp32")
    return replace(config, precision=replace(config.precision, dtype=dtype))


def check_topology(config: Config, world_size: int) -> None:
    """Refuse a number of ranks, or parallel sizes, that trunk and batch cannot be cut into."""
    data_size = check_parallel_sizes(world_size, config.parallel.tensor, config.parallel.pipeline)
    config.model.check_parallel(config.parallel.tensor, config.parallel.pipeline)
    cuts = [("", "global_size", config.batch.global_size, config.batch.micro_size, config.data.sequence_length)]
    in_force = batches(config)
    for one in lay_out(config):
        key = "ramp" if one.batch_size < in_force[one.index].global_size else "global_size"
        cuts.append((f"phases.{one.index}.", key, one.batch_size, one.micro_size, one.data.sequence_length))
    for where, key, windows, micro_size, length in cuts:
        share = data_size * micro_size
        if windows % share:
            raise UserError(f"{where}batch.{key}: {windows} windows cannot be split over {data_size} data-parallel "
                            f"ranks in micro-batches of batch.micro_size={micro_size}; make it a multiple of {share}")
        if config.parallel.sequence and length % config.parallel.tensor:
            raise UserError(f"{where}data.sequence_length: {length} is no multiple of "
                            f"parallel.tensor={config.parallel.tensor}, which parallel.sequence needs")


def check_kernels(config: Config) -> None:
    """Refuse what this machine's kernels cannot do with the trunk; `precision.dtype` is filled in."""
    precision, performance, dtype = config.precision, config.performance, DTYPES[config.precision.dtype]
    softcap = config.model.attention_softcap
    layers = choose_layers(config.model.layers, dtype, softcap)
    choose_attention(performance.attention, dtype, softcap)
    accumulation_fusion(performance.fuse_gradients, layers)
    if performance.overlap_tensor and len(micro_batch_tokens(config)) > 1:
        raise UserError("performance.overlap_tensor: true needs micro-batches of one size, and phases change "
                        "sequence_length or micro_size; change both, so that their product stays, or leave it out")
    if performance.overlap_tensor and (layers != "transformer_engine" or not config.parallel.sequence):
        raise UserError("performance.overlap_tensor: true needs Transformer Engine's layers and parallel.sequence=true")
    if precision.fp8 is None:
        return
    if refusal := fp8_refusal(precision.fp8, fp8_facts()):
        raise UserError(f"precision.fp8: {precision.fp8} is not possible here: {refusal}")
    if layers != "transformer_engine":
        raise UserError(f"precision.fp8: {precision.fp8} needs Transformer Engine's layers; leave model.layers out")
    for tokens in sorted(micro_batch_tokens(config)):
        problems = fp8_shape_problems(config.model, precision.fp8, config.parallel.tensor, tokens)
        if not problems:
            continue
        offer = "; precision.fp8=current may do" if precision.fp8 == "blockwise" else ""
        raise UserError(f"precision.fp8: {precision.fp8} cannot take {'; '.join(problems)}{offer}")
    for name in ("fp8_bf16_first", "fp8_bf16_last"):
        if getattr(precision, name) > config.model.num_layers // config.parallel.pipeline:
            raise UserError(f"precision.{name}: {getattr(precision, name)} is more than the layers of a pipeline stage")


def micro_batch_tokens(config: Config) -> set[int]:
    """How many tokens a micro-batch has, of evaluation and of each phase."""
    return {config.batch.micro_size * config.data.sequence_length,
            *(one.micro_size * one.data.sequence_length for one in lay_out(config))}


def resolved_yaml(config: Config) -> str:
    return yaml.safe_dump(schema.to_dict(config), sort_keys=False)


def definite(run: RunSettings) -> From | None:
    """`run.from` with its step, so that the same command means the same checkpoint for ever: the step in config.yaml of
    run.dir, if the run has begun, else the newest there is."""
    if run.from_ is None or run.from_.step is not None:
        return run.from_
    recorded = (last_config(run.dir).get("run") or {}).get("from") or {}
    if recorded.get("path") == run.from_.path and recorded.get("step") is not None:
        return replace(run.from_, step=recorded["step"])
    return replace(run.from_, step=read_run_state(checkpoint.directory_at(run.from_.path, None)).step)


def beginning(config: Config) -> dict:
    """What the state at step 0 follows from: the seed, or step and history hash of the run whose weights it took."""
    state, origin = None, config.run.from_
    if origin is not None:
        try:
            state = read_run_state(checkpoint.directory_at(origin.path, origin.step))
        except UserError:  # the parent is gone; the run itself remembers
            state = _remembered(config.run)
        else:
            if origin.state == "weights":
                return {"weights": {"step": state.step, "history_hash": state.history_hash}}
    weights = state.history.get("weights") if state else None  # a fork has its parent's initial weights
    return {"weights": weights} if weights else {"run_seed": config.run.seed}


def last_config(run: str | Path) -> dict:
    """config.yaml of a run directory, in the form that today's config has; {} where there is none."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return schema.to_dict(schema.build(Config, schema.load_yaml(path)))
    except UserError:  # of another version: its keys as they stand
        return schema.load_yaml(path)


def _remembered(run: RunSettings) -> RunState:
    """run_state.json of any checkpoint of the run: they agree on where its weights came from."""
    checkpoints = Path(run.dir) / "checkpoints"
    for name in reversed(checkpoint.saved_names(checkpoints)):
        try:
            return read_run_state(checkpoints / name)
        except UserError:
            continue
    return read_run_state(checkpoint.directory_at(run.from_.path, run.from_.step))  # says what is missing
