"""Where a run goes on from: its own newest checkpoint, another run's (a fork), another's weights, or nowhere.

    1. `find(plan, fallback)`    the checkpoint to load, checked against the plan  ->  `Origin`
    2. `_check_unsaved(...)`     no checkpoint: whether the directory may begin (again), or holds another life
    3. `refusal(...)`            what of the past differs: one line a key, recorded and asked for

The history up to the checkpoint's step must be the recorded one, by its hash; everything later, and everything
cosmetic, may change: `Origin.changed` says what did. So may the precision: the history keeps that of each step.
"""

import itertools
import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.checkpoint import RunState, read_run_state
from megatron_encdec.engine.integrity import LATEST, damaged, newest_intact, step_of, verify
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import Gone, IntegrityError, UserError
from megatron_encdec.rundir.lineage import changed_keys, differences, history_hash
from megatron_encdec.rundir.metrics import recorded
from megatron_encdec.training.config import Config
from megatron_encdec.training.earlier import in_todays_form
from megatron_encdec.training.plan import Plan, last_config, resolve

_RATES = ("optimizer.lr", "schedule", "phases", "run.total")  # what the learning rates follow from


@dataclass(frozen=True)
class Origin:
    """What a run starts with. `kind`: `new` (run.seed), `resume`, `fork`, `weights`.
    changed: key -> [recorded, asked for] of what differs from the last launch and may. parent: the run forked or
    begun from. fallback: the checkpoint passed over, what is wrong with it, and the one used. later: names of
    checkpoints of later steps beside it, which the run replaces when it gets there."""

    kind: str
    checkpoint: Path | None = None
    state: RunState | None = None
    changed: dict[str, list] = field(default_factory=dict)
    parent: dict | None = None
    fallback: dict | None = None
    later: list[str] = field(default_factory=list)


def find(plan: Plan, fallback: bool = False) -> Origin:
    """Where the run of `plan` goes on from; called by one process.
    fallback: verify the newest checkpoint, and take the newest intact one instead where it is damaged, or not known.
    Raises `UserError` where the config changes the past, or where the directory holds what the run would overwrite;
    `IntegrityError` where a checkpoint is unreadable, or a source is gone that the run reads from there on: a fallback
    may be to a checkpoint from before its end."""
    found = _found(plan, fallback)
    step = found.state.step if found.kind in ("resume", "fork") else 0
    plan.train.check_from(plan.timeline.at(step + 1).samples(step + 1).start, step + 1)
    return found


def _found(plan: Plan, fallback: bool) -> Origin:
    run = plan.config.run
    checkpoints = Path(run.dir) / "checkpoints"
    newest, passed_over = _first_save(Path(run.dir)) or _newest(checkpoints, fallback)
    last_launch = last_config(run.dir)
    changed = changed_keys(last_launch, schema.to_dict(plan.config)) if last_launch else {}
    if newest is not None:
        state = _with_same_past(plan, newest, Path(run.dir))
        later = [name for name in checkpoint.saved_names(checkpoints) if step_of(name) > state.step]
        return Origin("resume", newest, state, changed, None, passed_over, later)
    _check_unsaved(plan)
    if run.from_ is None:
        return Origin("new", changed=changed)
    found = checkpoint.directory_at(run.from_.path, run.from_.step)
    state = _state_of(found) if run.from_.state == "weights" else _with_same_past(plan, found, Path(run.from_.path))
    parent = {"path": run.from_.path, "step": state.step, "history_hash": state.history_hash, "state": run.from_.state}
    if run.from_.state == "weights":
        _check_trunk(plan, state, found)
        return Origin("weights", found, state, changed, parent)
    then, now = state.history["stretches"][-1]["precision"], plan.config.precision.identity()
    return Origin("fork", found, state, changed | changed_keys(then, now, "precision"), parent)


def check_origin(plan: Plan, fallback: bool) -> Origin | None:
    """Say what is wrong with where the run would go on from, before ranks are started; damage is left to `fallback`,
    and what is in a checkpoint's files to their loading. None where that leaves it open.
    A checkpoint that goes meanwhile is no mistake: another launch is saving here, as the lock will say."""
    try:
        found = find(plan)
        if found.checkpoint and (problems := verify(found.checkpoint, contents=False)):
            raise damaged(found.checkpoint, problems)
        return found
    except IntegrityError as error:
        if not fallback and not isinstance(error, Gone):
            raise
        return None


def _with_same_past(plan: Plan, found: Path, run: Path) -> RunState:
    """What the checkpoint `found` records, its history in today's form. A plan with another history up to its step is
    refused; `run`: whose config.yaml tells why. Steps that were done in another precision stay done in that one."""
    state = _state_of(found)
    if state.step > plan.timeline.total_steps:
        raise UserError(f"{found}: the run is at step {state.step}, the config ends at {plan.timeline.total_steps}; "
                        "make it longer (phases.N.steps or .tokens; run.total, where phases are fractions of it), or "
                        "use another run.dir")
    altered = history_hash(state.history) != state.history_hash
    state = replace(state, history=in_todays_form(state.history, plan.timeline, plan.tokenizer))
    history = plan.timeline.adopting(state.history).history(state.step)
    if altered or history_hash(history) != history_hash(state.history):
        if problems := verify(found):  # what is recorded may itself be altered
            raise damaged(found, problems)
        raise UserError(refusal(found, state.history, history, last_config(run), schema.to_dict(plan.config)))
    return state


def refusal(found: Path, then: dict, now: dict, config_then: dict, config_now: dict) -> str:
    """What differs, one line a key, and what to do."""
    step = then.get("step")
    return "\n".join([
        f"{found}: the config changes what determined this state (recorded -> asked for):",
        *_changed_past(then, now, config_then, config_now),
        f"Steps 1..{step} are done and cannot change. Give these keys back as recorded; or train in another run.dir "
        "from the start; or begin a new history there with these weights: "
        f"{shlex.quote(f'run.from.path={found.parent.parent}')} run.from.step={step} run.from.state=weights"])


def _changed_past(then: dict, now: dict, config_then: dict, config_now: dict) -> list[str]:
    """What differs between two histories. Hashes of learning rates say nothing to people: the keys they follow from
    are shown in their place, where they are on record."""
    pasts = [{key: value for key, value in history.items() if key != "stretches"} for history in (then, now)]
    lines, found = differences(*pasts), _changed_steps(then, now)
    cuts = [", ".join(f"{one['start'] + 1}..{one['end']}" for one in history.get("stretches", []))
            for history in (then, now)]
    if cuts[0] != cuts[1]:
        lines.append(f"phases: steps {cuts[0]} -> {cuts[1]}")
    whole = [(0, then.get("step") or 0)]
    renamed = any(line.startswith("objective.name:") for line in found)  # then their settings say nothing
    for line, where in found.items():
        if not line.startswith("learning_rates:") and (
                not renamed or line.startswith("objective.name:") or not line.startswith("objective.")):
            lines.append(line if where == whole else f"{_in_words(where, config_then)}: {line}")
    if any(line.startswith("learning_rates:") for line in found):
        lines += _changed_rates(config_then, config_now) or [
            "the learning rates (optimizer.lr, schedule, run.total, lengths of phases)"] * (cuts[0] == cuts[1])
    return [f"  {line}" for line in dict.fromkeys(lines)]


def _changed_steps(then: dict, now: dict) -> dict[str, list[tuple[int, int]]]:
    """What differs between the stretches of two histories -> (first step - 1, last step) where it does. Both are cut
    where either is: a step is compared with itself."""
    cuts = sorted({one[side] for history in (then, now) for one in history.get("stretches", [])
                   for side in ("start", "end")})
    found: dict[str, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(cuts):
        pair = [next(({key: value for key, value in one.items() if key not in ("start", "end")}
                      for one in history.get("stretches", []) if one["start"] <= start < one["end"]), {})
                for history in (then, now)]
        for line in differences(*pair):
            where = found.setdefault(line, [])
            if where and where[-1][1] == start:
                start_of = where.pop()[0]
                where.append((start_of, end))
            else:
                where.append((start, end))
    return found


def _in_words(where: list[tuple[int, int]], config: dict) -> str:
    """`steps 5..8 (phase 'mlm')`; the phases as `config` has them."""
    names, end = [], 0
    for phase in config.get("phases") or []:
        begin, end = end, end + (phase.get("steps") or 0)
        names += [repr(phase.get("name"))] * any(start < end and begin < last for start, last in where)
    steps = ", ".join(f"{start + 1}..{last}" for start, last in where)
    return f"steps {steps}" + (f" (phase {', '.join(names)})" if names else "")


def _changed_rates(then: dict, now: dict) -> list[str]:
    """The keys of two configs that learning rates follow from, where they differ; and why a longer run has others."""
    phases = [config.get("phases") or [] for config in (then, now)]
    both = min(map(len, phases))
    lines = [line for line in differences({**then, "phases": phases[0][:both]}, {**now, "phases": phases[1][:both]})
             if line.startswith(_RATES)]
    lines += [f"phases: {len(phases[0])} -> {len(phases[1])}"] * (len(phases[0]) != len(phases[1]))
    total, schedule = ((then.get("run") or {}).get("total") or {}).get("steps"), then.get("schedule") or {}
    if lines and total and total != ((now.get("run") or {}).get("total") or {}).get("steps"):
        if schedule.get("name") == "cosine":
            lines.append("schedule: cosine comes down over the whole run, so a longer or shorter one has other rates "
                         "from its first step on")
        elif decay := schedule.get("decay_steps"):
            lines.append(f"schedule: its decay ends with the run; steps after {total - decay} were done in the decay "
                         f"of a run of {total}. A checkpoint at or before step {total - decay} can go on: "
                         f"{_before(then, total - decay)}")
    return lines


def _before(config: dict, step: int) -> str:
    """How to go on from the newest checkpoint of a run that is not after `step`."""
    run = (config.get("run") or {}).get("dir") or ""
    found = [step_of(name) for name in checkpoint.saved_names(Path(run) / "checkpoints") if step_of(name) <= step]
    if not found:
        return f"none is here any more; in the next run checkpoint.steps=[{step}] keeps one"
    return f"run.dir=OTHER --fork {shlex.quote(f'{run}@{found[-1]}')}"


def _newest(checkpoints: Path, fallback: bool) -> tuple[Path | None, dict | None]:
    """The checkpoint to resume from, None where there is none, and which one was passed over for it."""
    found = checkpoints / LATEST
    try:
        newest = checkpoint.newest(checkpoints)
        if newest is None or not fallback:
            return newest, None
        found, problems = newest, verify(newest)
    except IntegrityError as error:
        problems = [str(error)]
    if not problems:
        return newest, None
    if not fallback:
        raise damaged(found, problems)
    if (intact := newest_intact(checkpoints, before=found.name)) is None:
        raise IntegrityError(f"{'; '.join(problems[:4])}; there is no intact checkpoint in {checkpoints}")
    return intact, {"damaged": found.name, "problems": problems[:4], "used": intact.name}


def _first_save(run: Path) -> tuple[Path, dict] | None:
    """The run's only checkpoint, where its launch was killed after that had its name and before `latest` named it.
    It can be told from a `latest` that was lost: the steps are in metrics.jsonl, and no save that has ended is."""
    checkpoints = run / "checkpoints"
    names = checkpoint.saved_names(checkpoints)
    if len(names) != 1 or os.path.lexists(checkpoints / LATEST):
        return None
    last, saved = recorded(run / "metrics.jsonl")
    if saved or last < max(1, step_of(names[0])):
        return None
    return checkpoints / names[0], {"damaged": LATEST, "problems": ["the first save was not quite finished"],
                                    "used": names[0]}


def _check_unsaved(plan: Plan) -> None:
    """Refuse to begin in a run.dir without a checkpoint that belongs to another life: one whose checkpoints were moved
    away, or one with another history. What a launch of this very run left is no obstacle."""
    run = Path(plan.config.run.dir)
    last, saved = recorded(run / "metrics.jsonl")
    away = f"move {run}/metrics.jsonl and {run}/config.yaml away to begin again here"
    if saved:
        raise UserError(f"{run}/metrics.jsonl: step {saved[-1]} was saved, but {run}/checkpoints holds no checkpoint; "
                        f"bring that directory back, train in another run.dir, or {away}")
    config = last_config(run)
    if not config:
        if last:
            raise UserError(f"{run}/metrics.jsonl: holds steps up to {last} of a run without config.yaml and without "
                            f"checkpoints; train in another run.dir, or move it away to begin here")
        return
    try:
        then = resolve(schema.build(Config, config)).timeline.history(last)
    except UserError as error:
        raise UserError(f"{run}/config.yaml: is of another run, which saved nothing, or can no longer be read as its "
                        f"config ({error}); train in another run.dir, or {away}") from None
    if lines := _changed_past(then, plan.timeline.history(last), config, schema.to_dict(plan.config)):
        raise UserError("\n".join([f"{run}: another run was begun here, which saved nothing (recorded -> asked for):",
                                   *lines, f"Give these keys back as recorded, train in another run.dir, or {away}."]))


def _state_of(found: Path) -> RunState:
    """run_state.json; where it is damaged, the error offers an intact checkpoint."""
    try:
        return read_run_state(found)
    except IntegrityError as error:
        raise damaged(found, [str(error)]) from None


def _check_trunk(plan: Plan, state: RunState, found: Path) -> None:
    last = (state.history.get("stretches") or [{}])[-1]
    ropes = ("rope_theta", "rope_scaling", "local_rope_theta")
    theirs = dict(state.history["model"])
    if ropes[0] in last:  # a rotary embedding of its own, perhaps one without scaling
        theirs = {key: value for key, value in theirs.items() if key not in ropes} | {
            key: last[key] for key in ropes if key in last}
    if changed := differences(theirs, plan.timeline.history(0)["model"], "model"):
        raise UserError("\n".join([f"{found}: these weights are of another trunk (theirs -> asked for):",
                                   *(f"  {line}" for line in changed), "Give the model its keys."]))
