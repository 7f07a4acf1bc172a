"""The phases of a config as stretches: what each inherits and changes, where it begins and ends.

    1. `_in_force(config)`   what holds in each phase: the config's sections with the changes of all phases up to it
    2. `_lengths(...)`       steps, tokens and fractions -> whole steps, which add up to `run.total`
    3. `lay_out(config)`     one stretch a phase; where its batch grows, one for each size
"""

import math
from dataclasses import dataclass, replace

from megatron_encdec.data.config import DataConfig
from megatron_encdec.data.training_data import Declaration
from megatron_encdec.engine.config import BatchSettings, ScheduleSettings
from megatron_encdec.model.parts import Frozen
from megatron_encdec.model.rope import Rope
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import Config, PhaseSettings
from megatron_encdec.training.stretches import Stretch

MOST_STEPS = 10_000_000  # of a run: the learning rate of each is part of its history


@dataclass(frozen=True)
class _InForce:
    """What holds in a phase. section: of the config, that says the data; sources: the key that gives its text.
    plateaus: (steps, windows of a step) of its ramp."""

    data: DataConfig
    section: str
    sources: str
    batch: BatchSettings
    lr: float
    rope: Rope
    freeze: Frozen = Frozen()
    plateaus: tuple[tuple[int, int], ...] = ()

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_size * self.data.sequence_length

    def steps_for(self, tokens: float) -> int:
        """Whole steps that read so many tokens or a few more."""
        steps = 0
        for count, windows in self.plateaus:
            size = windows * self.data.sequence_length
            here = min(count, math.ceil(tokens / size))
            steps, tokens = steps + here, tokens - here * size
            if tokens <= 0:
                return steps
        return steps + math.ceil(tokens / self.tokens_per_step)


def lay_out(config: Config) -> list[Stretch]:
    """The phases with their steps; their lengths must add up to `run.total` where that is given."""
    in_force = _in_force(config)
    lengths = _lengths(config, in_force)
    sizes = [_sizes(index, now, steps) for index, (now, steps) in enumerate(zip(in_force, lengths, strict=True))]
    pieces = [[(count, windows * now.data.sequence_length) for count, windows in parts]
              for now, parts in zip(in_force, sizes, strict=True)]
    if config.run.total.tokens and not _all_alike(in_force):
        _check_tokens(config.run.total.tokens, [sum(count * tokens for count, tokens in parts) for parts in pieces],
                      sum(now.tokens_per_step for now in in_force))
    schedule = _in_steps("schedule", config.schedule, sum(pieces, []))
    _check_ends(config, in_force)
    model, stretches, at, sample = config.model, [], 0, 0
    for index, (settings, now, steps) in enumerate(zip(config.phases, in_force, lengths, strict=True)):
        start, own = at, (schedule, 0, sum(lengths))
        if settings.schedule is not None:
            own = _in_steps(f"phases.{index}.schedule", settings.schedule, pieces[index]), start, steps
        optimizer = replace(config.optimizer, lr=now.lr)
        rope = None if now.rope == model.rope else now.rope
        for count, windows in sizes[index]:
            stretches.append(Stretch(
                index, settings.name, at, at + count, start, steps, sample, settings.objective,
                settings.optimizer_state if at == start else "carry", now.data, windows, now.batch.micro_size,
                optimizer, *own, config.precision.identity(), now.freeze, rope, now.section,
                now.sources))
            at, sample = at + count, sample + count * windows
    return stretches


def _in_force(config: Config) -> list[_InForce]:
    """What holds in each phase."""
    model = config.model
    now = _InForce(config.data, "data", "data.train", config.batch, config.optimizer.lr, model.rope)
    found = []
    for index, phase in enumerate(config.phases):
        where, ramp = f"phases.{index}", phase.batch and phase.batch.ramp
        if phase.data:
            now = replace(now, data=_applied(phase.data, now.data, f"{where}.data"), section=f"{where}.data",
                          sources=f"{where}.data.train" if phase.data.train else now.sources)
        if phase.batch:
            now = replace(now, batch=_applied(phase.batch, now.batch, f"{where}.batch"))
        if phase.freeze is not None:
            now = replace(now, freeze=Frozen.parse(phase.freeze))
            now.freeze.check(model.num_layers, model.head_is_embeddings, f"{where}.freeze")
        if phase.local_rope_theta and not model.layers_with_window:
            raise UserError(f"{where}.local_rope_theta: no layer has a window; set model.sliding_window, or leave this "
                            "out")
        scaling = now.rope.scaling if phase.rope_scaling is None else phase.rope_scaling or None
        rope = Rope(phase.rope_theta or now.rope.theta, scaling, phase.local_rope_theta or now.rope.local_theta)
        plateaus = ramp.plateaus(now.batch.global_size, now.data.sequence_length) if ramp else ()
        now = replace(now, lr=phase.lr or now.lr, rope=rope, plateaus=tuple(plateaus))
        found.append(now)
    return found


def batches(config: Config) -> list[BatchSettings]:
    """What each phase has as its batch, once its ramp is over."""
    return [now.batch for now in _in_force(config)]


def _applied(change, settings, where: str):
    try:
        return change.applied_to(settings)
    except ValueError as error:
        raise UserError(f"{where}.{error}") from None


def _lengths(config: Config, in_force: list[_InForce]) -> list[int]:
    """Steps of each phase. A length in steps or tokens is kept; the ends of shares of the run are rounded, and the
    last share gives or takes what is then missing from the total."""
    total = config.run.total
    steps = total.steps
    if total.tokens and _all_alike(in_force):
        steps = math.ceil(total.tokens / in_force[0].tokens_per_step)
    lengths, position, shares = [], 0.0, []
    for index, (phase, now) in enumerate(zip(config.phases, in_force, strict=True)):
        length = _length(phase, now, config)
        position += length
        if phase.fraction is not None:
            length, shares = round(position) - sum(lengths), [*shares, index]
        lengths.append(int(length))
    if steps is not None and shares and abs(position - steps) <= 0.5:
        lengths[shares[-1]] += steps - sum(lengths)  # by what was rounded
    for index, (phase, now, length) in enumerate(zip(config.phases, in_force, lengths, strict=True)):
        if length < 1:
            raise UserError(f"phases.{index}: {phase.name!r} comes to less than one step of {now.tokens_per_step} "
                            "tokens")
    if steps is not None and sum(lengths) != steps:
        way = "change the phases or run.total" if shares else "change phases.N.steps, or leave run.total out"
        raise UserError(f"phases: their steps {' + '.join(map(str, lengths))} = {sum(lengths)} do not add up to the "
                        f"run's total of {steps} steps; {way}")
    if sum(lengths) > MOST_STEPS:
        raise UserError(f"phases: {sum(lengths):,} steps are more than a run can have ({MOST_STEPS:,}); make the batch "
                        "larger, or the phases shorter")
    return lengths


def _all_alike(in_force: list[_InForce]) -> bool:
    """Whether every step of the run has as many tokens."""
    return not any(now.plateaus for now in in_force) and len({now.tokens_per_step for now in in_force}) == 1


def _check_tokens(total: int, consumed: list[int], rounding: int) -> None:
    """Refuse phases that do not consume `total` tokens; each may be a step longer or shorter, `rounding` in all."""
    if abs(sum(consumed) - total) >= rounding:
        raise UserError(f"phases: their tokens {' + '.join(f'{one:,}' for one in consumed)} = {sum(consumed):,} do not "
                        f"add up to the run's total of {total:,} tokens; change the phases or run.total")


def _length(phase: PhaseSettings, now: _InForce, config: Config) -> float:
    """Steps, a fraction of one where they are a share of the run."""
    total = config.run.total
    if phase.steps is not None:
        return phase.steps
    if phase.tokens is not None:
        return now.steps_for(phase.tokens)
    if total.steps is not None:
        return phase.fraction * total.steps
    if total.tokens is None:
        raise UserError(f"phases: {phase.name!r} is a fraction of the run, so run.total.steps or "
                        "run.total.tokens must be given")
    if now.plateaus:
        return now.steps_for(phase.fraction * total.tokens)
    return phase.fraction * math.ceil(total.tokens / now.tokens_per_step)


def _sizes(index: int, now: _InForce, steps: int) -> list[tuple[int, int]]:
    """(steps, windows of a step) of a phase's parts: the plateaus of its ramp, and the rest."""
    ramp = sum(count for count, _ in now.plateaus)
    if ramp > steps:
        raise UserError(f"phases.{index}.batch.ramp.tokens: the ramp comes to {ramp} steps, the phase has {steps}; "
                        "shorten the ramp or lengthen the phase")
    return [*now.plateaus, *([(steps - ramp, now.batch.global_size)] if steps > ramp else [])]


def _in_steps(where: str, given: ScheduleSettings, pieces: list[tuple[int, int]]) -> ScheduleSettings:
    """`given` in steps alone. pieces: (steps, tokens of a step) of all that it covers, in order."""
    schedule, total = given.in_steps(pieces), sum(steps for steps, _ in pieces)
    if schedule.warmup_steps + schedule.decay_steps > total:
        warmup, decay = (f"{name}_steps={steps}" if tokens is None else f"{name}_tokens={tokens} ({steps} steps)"
                         for name, steps, tokens in (("warmup", schedule.warmup_steps, given.warmup_tokens),
                                                     ("decay", schedule.decay_steps, given.decay_tokens)))
        raise UserError(f"{where}: {warmup} + {decay} is more than its {total} steps")
    return schedule


def _check_ends(config: Config, in_force: list[_InForce]) -> None:
    """A decay goes down."""
    for index, (phase, now) in enumerate(zip(config.phases, in_force, strict=True)):
        schedule, where = config.schedule, "schedule"
        if phase.schedule is not None:
            schedule, where = phase.schedule, f"phases.{index}.schedule"
        decays = schedule.name == "cosine" or schedule.name == "wsd" and (schedule.decay_steps or schedule.decay_tokens)
        if decays and schedule.final_lr > now.lr:
            raise UserError(f"{where}.final_lr: {schedule.final_lr} is above the peak of phase {phase.name!r}, "
                            f"{now.lr}, so its rate would rise; lower it, or give final_fraction, a part of the peak")


def with_phase_steps(config: Config, stretches: list[Stretch]) -> Config:
    """The config with every phase's length, and the total, in steps."""
    steps = {stretch.index: stretch.phase_steps for stretch in stretches}
    settings = [replace(old, steps=steps[index], tokens=None, fraction=None)
                for index, old in enumerate(config.phases)]
    total = replace(config.run.total, steps=stretches[-1].end, tokens=None)
    return replace(config, phases=settings, run=replace(config.run, total=total))


def declarations(stretches: list[Stretch]) -> list[Declaration]:
    """The data of a run: what holds from which sample on."""
    found: list[Declaration] = []
    for stretch in stretches:
        end = stretch.samples(stretch.end).stop
        if found and found[-1].config == stretch.data:
            found[-1] = replace(found[-1], end=end)
        else:
            found.append(Declaration(stretch.first_sample, end, stretch.data, stretch.data_section, stretch.train_key))
    return found
