"""`pretrain --dry-run`: what a config comes to, on any machine, also where data and tokenizer are still to be made."""

from dataclasses import replace
from pathlib import Path

from megatron_encdec.data.config import DataConfig
from megatron_encdec.data.store import AbsentStore
from megatron_encdec.data.training_data import TrainingData
from megatron_encdec.engine.config import BatchSettings
from megatron_encdec.model.flops import training_flops, whole_pairs
from megatron_encdec.model.parts import Frozen
from megatron_encdec.model.rope import Rope
from megatron_encdec.platform import schema
from megatron_encdec.platform.distributed import check_parallel_sizes
from megatron_encdec.platform.errors import WARNING, UserError
from megatron_encdec.rundir.lineage import differences
from megatron_encdec.text.tokenizer import load_tokenizer
from megatron_encdec.training.config import Config
from megatron_encdec.training.layout import batches, lay_out, with_phase_steps
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
from megatron_encdec.training.stretches import Stretch, by_phase, tokens_between


def describe(config: Config, ranks: int, fallback: bool = False) -> str:
    """The resolved config, its phases, estimates of parameters, compute and memory on `ranks` ranks; what is missing or
    not for this machine. Raises `UserError` for what no machine could do, and where run.dir holds another run."""
    check_topology(config, ranks)
    notes = [f"missing: {line}" for line in missing_inputs(config)]
    if notes:
        train, config = None, with_phase_steps(with_dtype(config), lay_out(config))
        config, assumed = with_vocabulary(config)
        notes += assumed
    else:
        plan = resolve(config)
        check_origin(plan, fallback)
        train, config = plan.train, plan.config
    try:
        check_kernels(config)
        notes += plan.notes if train else []
    except UserError as error:
        notes.append(f"not on this machine: {error}")
    return "\n".join([resolved_yaml(config), *_phases(config, stretches := lay_out(config)), "",
                      *_estimates(config, stretches, ranks, train), *map(_line, sorted(notes, key=_is_loud))])


def _is_loud(note: str) -> bool:
    return note.startswith(WARNING)


def _line(note: str) -> str:
    return f"WARNING      {note.removeprefix(WARNING)}" if _is_loud(note) else f"note         {note}"


def with_vocabulary(config: Config) -> tuple[Config, list[str]]:
    """`config` with a size of the vocabulary, the tokenizer's where it is there; what to say of one that is assumed."""
    settings = config.tokenizer
    if config.model.vocabulary_size is not None:
        return config, []
    size, notes = ASSUMED_VOCABULARY, [f"model.vocabulary_size: {ASSUMED_VOCABULARY:,} is assumed, the tokenizer will "
                                       "tell"]
    if Path(settings.path).exists():
        size, notes = load_tokenizer(settings.path, settings.mask_token, settings.eod_token).vocabulary_size, []
    return replace(config, model=replace(config.model, vocabulary_size=size)), notes


def state_bytes(config: Config, ranks: int) -> float:
    """Of weights, gradients and optimizer on one of `ranks` ranks; the vocabulary's size is known."""
    data_size = check_parallel_sizes(ranks, config.parallel.tensor, config.parallel.pipeline)
    mine = config.model.parameter_count() / (config.parallel.tensor * config.parallel.pipeline)
    return mine * ((6 if config.precision.dtype == "bf16" else 8) + 12 / data_size)


def _phases(config: Config, stretches: list[Stretch]) -> list[str]:
    """Each phase, and below it what it changes."""
    rows, notes = [("phase", "objective", "steps", "tokens")], [[]]
    before = _changeable(config, config.data, config.batch, config.optimizer.lr, None, Frozen())
    for parts, batch in zip(by_phase(stretches), batches(config), strict=True):
        first, last = parts[0], parts[-1]
        steps, tokens = f"{first.start + 1}..{last.end}", tokens_between(parts, 0, last.end)
        rows.append((first.name, first.objective.label(), steps, f"{tokens:,}"))
        now = _changeable(config, last.data, batch, last.optimizer.lr, last.rope, last.freeze)
        changes = differences(before, now)
        if first.batch_size < batch.global_size:
            changes.append(_ramp(parts, batch))
        if config.phases[first.index].schedule:
            changes.append("schedule: its own")
        if first.optimizer_state != "carry":
            changes.append(f"optimizer_state: {first.optimizer_state}")
        notes.append([f"  {change}" for change in changes])
        before = now
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(4)]
    return [line for (name, objective, steps, tokens), below in zip(rows, notes, strict=True) for line in (
        f"{name:<{widths[0]}}{objective:<{widths[1]}}{steps:<{widths[2]}}{tokens:>{widths[3]}}", *below)]


def _ramp(parts: list[Stretch], batch: BatchSettings) -> str:
    first, last = parts[0], parts[-1]
    grows = f"{first.batch_size} windows" if len(parts) == 1 else \
        f"{first.batch_size} -> {last.batch_size} windows in {len(parts)} sizes, the last from step {last.start + 1} on"
    short = f"; the phase ends before {batch.global_size} are reached" if last.batch_size < batch.global_size else ""
    return f"batch.ramp: {grows}{short}"


def _changeable(config: Config, data: DataConfig, batch: BatchSettings, lr: float, rope: Rope | None,
                frozen: Frozen) -> dict:
    """What a phase may change, by key."""
    rope = rope or config.model.rope
    shown = {key: value for key, value in schema.to_dict(data).items() if key not in ("train", "validation", "seed")}
    blend = ", ".join(f"{one.path} ({one.weight:g})" for one in data.train)
    return {"data": {"train": blend, **shown}, "batch": schema.to_dict(batch), "lr": lr,
            "freeze": ", ".join(frozen.words), **{"rope_scaling": None, "local_rope_theta": None, **rope.identity()}}


def _range(stretches: list[Stretch], name: str) -> str:
    """An attribute over the whole run: `8`, or `4 to 8`."""
    values = [getattr(one, name) for one in stretches]
    return " to ".join(f"{value:,}" for value in dict.fromkeys((min(values), max(values))))


def _estimates(config: Config, stretches: list[Stretch], ranks: int, train: TrainingData | None) -> list[str]:
    model = config.model
    total = tokens_between(stretches, 0, stretches[-1].end)
    known = train and not any(isinstance(store, AbsentStore) for store in train.stores)
    available = sum(store.tokens for store in train.stores) if known else 0
    epochs = f" = {total / available:,.2f} epochs of the training data" if known else ""
    each = [(tokens := one.steps * one.tokens_per_step,
             whole_pairs(tokens, one.data.sequence_length, "bidirectional", model.sliding_window), tokens, one.freeze)
            for one in stretches]
    return [
        f"parameters   {model.parameter_count():,} ({model.parameter_count(with_head=False):,} without the head)",
        f"step         {_range(stretches, 'batch_size')} windows, {_range(stretches, 'tokens_per_step')} tokens",
        f"tokens       {total:,}{epochs}",
        f"compute      {sum(training_flops(model, *one) for one in each):.3g} FLOP at most",
        f"memory       {state_bytes(config, ranks) / 2**30:.2f} GiB a rank for weights, gradients and optimizer; "
        "activations come on top"]
