"""The plan of a run: the config with everything resolved that needs a look at tokenizer, data and machine.

    1. `make_plan(config)`     open tokenizer and data, check that they agree, resolve phases and precision
    2. `describe(plan)`        what `--dry-run` prints
"""

from dataclasses import dataclass, replace

import torch
import yaml

from megatron_encdec.data.samples import Samples
from megatron_encdec.model.config import choose_layers
from megatron_encdec.model.flops import training_flops, whole_pairs
from megatron_encdec.model.performance import accumulation_fusion, choose_attention, kernel_notes
from megatron_encdec.model.precision import fp8_shape_problems
from megatron_encdec.objectives import Objective, ObjectiveConfig, build_objective
from megatron_encdec.platform import schema
from megatron_encdec.platform.device import bf16_is_native
from megatron_encdec.platform.distributed import RankEnvironment, check_parallel_sizes
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.fp8 import fp8_facts, fp8_refusal
from megatron_encdec.text.tokenizer import Tokenizer, load_tokenizer, require_mask
from megatron_encdec.training.config import Config
from megatron_encdec.training.parent import resolve, weights_of
from megatron_encdec.training.phases import Timeline, lay_out, tokens_per_step, with_phase_steps

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Plan:
    """A run, ready to start: the resolved config and what it points at."""

    config: Config
    tokenizer: Tokenizer
    train: Samples
    validation: Samples | None
    timeline: Timeline
    objectives: list[Objective]  # one a phase
    evaluated: dict[str, Objective]  # objective name -> what validation measures

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return DTYPES[self.config.precision.dtype]

    @property
    def notes(self) -> list[str]:
        """What the user should know of data and kernels before the first step."""
        config, data = self.config, self.config.data
        consumed = self.timeline.total_steps * config.batch.global_size
        kernels = kernel_notes(choose_layers(config.model.layers, self.dtype), config.run.deterministic,
                               config.model.num_attention_heads // config.parallel.tensor, data.sequence_length,
                               config.batch.micro_size, data.isolate_documents or data.random_length is not None)
        return self.train.notes(consumed) + (self.validation.notes(0) if self.validation else []) + kernels


def make_plan(config: Config, world_size: int | None = None) -> Plan:
    """Resolve `config`; every mistake that can be seen before training starts is a `UserError` here."""
    phases = lay_out(config)
    _check_machine(config, RankEnvironment.read().world_size if world_size is None else world_size)
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.mask_token, config.tokenizer.eod_token)
    if any(phase.objective.name == "mlm" for phase in phases):
        require_mask(tokenizer)
    train = Samples(config.data, "train")
    validation = Samples(config.data, "validation") if config.data.validation else None
    for store in [*train.stores, *(validation.stores if validation else [])]:
        if store.tokenizer:
            tokenizer.check_wrote(store.prefix, store.tokenizer.fingerprint, "tokenizer.path")
    config = _resolve(config, phases, tokenizer)
    _check_kernels(config)

    def build(objective: ObjectiveConfig) -> Objective:
        return build_objective(objective, tokenizer.mask_id, tokenizer.special_ids, tokenizer.vocabulary_size)

    evaluated = {phase.objective.name: build(phase.objective) for phase in reversed(phases)}
    evaluated.setdefault("clm", build(ObjectiveConfig("clm")))
    if tokenizer.mask_id is not None:
        evaluated.setdefault("mlm", build(ObjectiveConfig("mlm")))
    masking = {"mask_id": tokenizer.mask_id, "ordinary_ids": tokenizer.ordinary_ids_sha256()}
    timeline = Timeline(config, train.fingerprints, masking, weights_of(config))
    return Plan(config, tokenizer, train, validation, timeline,
                [build(phase.objective) for phase in phases], dict(sorted(evaluated.items())))


def _resolve(config: Config, phases, tokenizer: Tokenizer) -> Config:
    given = config.model.vocabulary_size
    if given is not None and given < tokenizer.vocabulary_size:  # released models often have rows to spare
        raise UserError(f"model.vocabulary_size: {given}, but the tokenizer {config.tokenizer.path} has "
                        f"{tokenizer.vocabulary_size} tokens; leave the key out")
    dtype = config.precision.dtype or ("bf16" if bf16_is_native() or config.precision.fp8 else "fp32")
    resolved = with_phase_steps(config, phases)
    return replace(resolved,
                   model=replace(config.model, vocabulary_size=given or tokenizer.vocabulary_size),
                   precision=replace(config.precision, dtype=dtype),
                   run=replace(config.run, total=resolved.run.total, from_=resolve(config.run)))


def _check_machine(config: Config, world_size: int) -> None:
    data_size = check_parallel_sizes(world_size, config.parallel.tensor, config.parallel.pipeline)
    config.model.check_parallel(config.parallel.tensor, config.parallel.pipeline)
    share = data_size * config.batch.micro_size
    if config.batch.global_size % share:
        raise UserError(f"batch.global_size: {config.batch.global_size} windows cannot be split over {data_size} "
                        f"data-parallel ranks in micro-batches of batch.micro_size={config.batch.micro_size}; "
                        f"make it a multiple of {share}")
    if config.parallel.sequence and config.data.sequence_length % config.parallel.tensor:
        raise UserError(f"data.sequence_length: {config.data.sequence_length} is no multiple of "
                        f"parallel.tensor={config.parallel.tensor}, which parallel.sequence needs")


def _check_kernels(config: Config) -> None:
    """Refuse what the machine's kernels cannot do with this trunk; the dtype is resolved."""
    precision, performance, dtype = config.precision, config.performance, DTYPES[config.precision.dtype]
    layers = choose_layers(config.model.layers, dtype)
    choose_attention(performance.attention, dtype)
    accumulation_fusion(performance.fuse_gradients, layers)
    if performance.overlap_tensor and (layers != "transformer_engine" or not config.parallel.sequence):
        raise UserError("performance.overlap_tensor: true needs Transformer Engine's layers and parallel.sequence=true")
    if precision.fp8 is None:
        return
    if refusal := fp8_refusal(precision.fp8, fp8_facts()):
        raise UserError(f"precision.fp8: {precision.fp8} is not possible here: {refusal}")
    if layers != "transformer_engine":
        raise UserError(f"precision.fp8: {precision.fp8} needs Transformer Engine's layers; leave model.layers out")
    problems = fp8_shape_problems(config.model, precision.fp8, config.parallel.tensor,
                                  config.batch.micro_size * config.data.sequence_length)
    if problems:
        offer = "; precision.fp8=current may do" if precision.fp8 == "blockwise" else ""
        raise UserError(f"precision.fp8: {precision.fp8} cannot take {'; '.join(problems)}{offer}")
    for name in ("fp8_bf16_first", "fp8_bf16_last"):
        if getattr(precision, name) > config.model.num_layers // config.parallel.pipeline:
            raise UserError(f"precision.{name}: {getattr(precision, name)} is more than the layers of a pipeline stage")


def describe(plan: Plan, data_size: int) -> str:
    """The resolved config, the phases with their tokens, and estimates of parameters and memory."""
    config, model, tokens = plan.config, plan.config.model, tokens_per_step(plan.config)
    length = config.data.sequence_length
    shards = config.parallel.tensor * config.parallel.pipeline
    mine = model.parameter_count() / shards
    weights, moments = (6, 12 / data_size) if config.precision.dtype == "bf16" else (8, 12 / data_size)
    lines = [yaml.safe_dump(schema.to_dict(config), sort_keys=False).rstrip(), "",
             "phase                  objective   steps                    tokens"]
    for phase, objective in zip(plan.timeline.phases, plan.objectives, strict=True):
        steps = f"{phase.start + 1}..{phase.end}"
        lines.append(f"{phase.name:<22} {objective.name:<11} {steps:<18} {(phase.end - phase.start) * tokens:>12,}")
    total = plan.timeline.total_steps * tokens
    epochs = total / (plan.train.len_windows * config.data.sequence_length)
    lines += [
        "",
        f"parameters   {model.parameter_count():,} ({model.parameter_count(with_head=False):,} without the head)",
        f"tokens       {total:,} = {epochs:.2f} epochs of the training data",
        f"compute      {training_flops(model, total, whole_pairs(total, length, 'bidirectional'), total):.3g} FLOP at "
        "most",
        f"memory       {mine * (weights + moments) / 2**30:.2f} GiB a rank for weights, gradients and optimizer; "
        "activations come on top",
        *(f"note         {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def resolved_yaml(config: Config) -> str:
    """config.yaml of the run directory."""
    return yaml.safe_dump(schema.to_dict(config), sort_keys=False)
