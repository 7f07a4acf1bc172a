"""`pretrain --dry-run`: what a config comes to, on any machine, also where data and tokenizer are still to be made."""

from dataclasses import replace

from megatron_encdec.data.samples import Samples
from megatron_encdec.model.config import training_flops, whole_pairs
from megatron_encdec.platform.distributed import check_parallel_sizes
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import Config
from megatron_encdec.training.origin import check_origin
from megatron_encdec.training.plan import (
    ASSUMED_VOCABULARY,
    check_kernels,
    check_topology,
    missing_inputs,
    resolve,
    resolved_yaml,
    with_dtype,
)
from megatron_encdec.training.stretches import Stretch, lay_out, with_phase_steps


def describe(config: Config, ranks: int, fallback: bool = False) -> str:
    """The resolved config, its phases, estimates of parameters, compute and memory on `ranks` ranks; what is missing or
    not for this machine. Raises `UserError` for what no machine could do, and where run.dir holds another run."""
    check_topology(config, ranks)
    notes = [f"missing: {line}" for line in missing_inputs(config)]
    if notes:
        train, config = None, with_phase_steps(with_dtype(config), lay_out(config))
        if config.model.vocabulary_size is None:
            config = replace(config, model=replace(config.model, vocabulary_size=ASSUMED_VOCABULARY))
            notes.append(f"model.vocabulary_size: {ASSUMED_VOCABULARY:,} is assumed, the tokenizer will tell")
    else:
        plan = resolve(config)
        check_origin(plan, fallback)
        train, config = plan.train, plan.config
    try:
        check_kernels(config)
        notes += plan.notes if train else []
    except UserError as error:
        notes.append(f"not on this machine: {error}")
    data_size = check_parallel_sizes(ranks, config.parallel.tensor, config.parallel.pipeline)
    return "\n".join([resolved_yaml(config), *_phases(stretches := lay_out(config)), "",
                      *_estimates(config, stretches, data_size, train), *(f"note         {note}" for note in notes)])


def _phases(stretches: list[Stretch]) -> list[str]:
    lines = ["phase                  objective   steps                    tokens"]
    for stretch in stretches:
        steps, tokens = f"{stretch.start + 1}..{stretch.end}", stretch.steps * stretch.tokens_per_step
        frozen = f"  frozen: {', '.join(stretch.freeze.words)}" if stretch.freeze else ""
        lines.append(f"{stretch.name:<22} {stretch.objective.name:<11} {steps:<18} {tokens:>12,}{frozen}")
    return lines


def _estimates(config: Config, stretches: list[Stretch], data_size: int, train: Samples | None) -> list[str]:
    model, length = config.model, config.data.sequence_length
    total = sum(stretch.steps * stretch.tokens_per_step for stretch in stretches)
    epochs = f" = {total / (train.len_windows * length):.2f} epochs of the training data" if train else ""
    each = [(tokens := stretch.steps * stretch.tokens_per_step,
             whole_pairs(tokens, stretch.data.sequence_length, "bidirectional"), tokens, stretch.freeze)
            for stretch in stretches]
    mine = model.parameter_count() / (config.parallel.tensor * config.parallel.pipeline)
    weights, moments = (6, 12 / data_size) if config.precision.dtype == "bf16" else (8, 12 / data_size)
    return [
        f"parameters   {model.parameter_count():,} ({model.parameter_count(with_head=False):,} without the head)",
        f"tokens       {total:,}{epochs}",
        f"compute      {sum(training_flops(model, *one) for one in each):.3g} FLOP at most",
        f"memory       {mine * (weights + moments) / 2**30:.2f} GiB a rank for weights, gradients and optimizer; "
        "activations come on top"]
