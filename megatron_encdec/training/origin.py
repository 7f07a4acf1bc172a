"""Where a run goes on from: its own newest checkpoint, another run's (a fork), another's weights, or nowhere.

    1. `find(plan, fallback)`    the checkpoint to load, checked against the plan  ->  `Origin`
    2. `_check_unsaved(...)`     no checkpoint: whether the directory may begin (again), or holds another life
    3. `refusal(...)`            what of the past differs: one line a key, recorded and asked for

The history up to the checkpoint's step must be the recorded one, by its hash; everything later, and everything
cosmetic, may change, and what changed is in `Origin.changed`. So may the precision: the history keeps in which one
each step was done.
"""

import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.integrity import damaged, newest_intact, verify
from megatron_encdec.engine.names import LATEST, step_of
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.lineage import differences, history_hash
from megatron_encdec.rundir.metrics import recorded
from megatron_encdec.training.config import Config
from megatron_encdec.training.parent import last_config
from megatron_encdec.training.plan import make_plan

_RATES = ("optimizer.lr", "schedule", "phases", "run.total")  # what the learning rates follow from


@dataclass(frozen=True)
class Origin:
    """What a run starts with. `kind`: `new` (run.seed), `resume`, `fork`, `weights`.

    changed: key -> [recorded, asked for] of what differs from the last launch and may. parent: the run forked or
    begun from. fallback: the checkpoint passed over, what is wrong with it, and the one used. later: names of
    checkpoints of later steps beside it, which the run replaces when it gets there.
    """

    kind: str
    checkpoint: Path | None = None
    state: dict | None = None
    changed: dict[str, list] = field(default_factory=dict)
    parent: dict | None = None
    fallback: dict | None = None
    later: list[str] = field(default_factory=list)


def find(plan, fallback: bool = False) -> Origin:
    """Where the run of `plan` goes on from; one process, reads small files only unless `fallback`.

    fallback: verify the newest checkpoint, and take the newest intact one instead where it is damaged, or not known.
    Raises `UserError` where the config changes the past, or where the directory holds what the run would overwrite;
    `IntegrityError` where a checkpoint is unreadable.
    """
    run = plan.config.run
    checkpoints = Path(run.dir) / "checkpoints"
    newest, passed_over = _first_save(Path(run.dir)) or _newest(checkpoints, fallback)
    changed = _changes(plan, run.dir)
    if newest is not None:
        state = _state_of(newest)
        check_history(plan, state, newest, Path(run.dir))
        later = [name for name in checkpoint.saved_names(checkpoints) if step_of(name) > state["step"]]
        return Origin("resume", newest, state, changed, None, passed_over, later)
    _check_unsaved(plan)
    if run.from_ is None:
        return Origin("new", changed=changed)
    found = checkpoint.directory_at(run.from_.path, run.from_.step)
    state = _state_of(found)
    parent = {"path": run.from_.path, "step": state["step"], "history_hash": state["history_hash"],
              "state": run.from_.state}
    if run.from_.state == "weights":
        _check_trunk(plan, state, found)
        return Origin("weights", found, state, changed, parent)
    check_history(plan, state, found, Path(run.from_.path))
    then, now = _last_precision(state["history"]), plan.config.precision.identity()
    return Origin("fork", found, state, changed | changed_keys(then, now, "precision"), parent)


def check_history(plan, state: dict, found: Path, run: Path) -> None:
    """Refuse a plan whose history up to the step of `found` is not the recorded one; `run`: whose config.yaml."""
    step = state["step"]
    if step > plan.timeline.total_steps:
        raise UserError(f"{found}: the run is at step {step}, the config ends at {plan.timeline.total_steps}; "
                        "raise run.total or use another run.dir")
    history = plan.timeline.history(step)
    if "precision" in state["history"]:  # it may change from here on: what was done was done in the recorded one
        history["precision"] = state["history"]["precision"]
    _keep_recorded_masking(history, state["history"], plan.tokenizer)
    if history_hash(history) != state["history_hash"]:
        if problems := verify(found):  # what is recorded may itself be altered
            raise damaged(found, problems)
        raise UserError(refusal(found, state["history"], history, last_config(run),
                                schema.to_dict(plan.config)))


def _keep_recorded_masking(history: dict, recorded: dict, tokenizer) -> None:
    """Earlier versions put the sha256 of the tokenizer's file into the history, where the ids that masks depend on
    stand now: of the same file both say the same."""
    for then, now in zip(recorded["phases"], history["phases"], strict=False):
        old, new = then["masking"] or {}, now["masking"] or {}
        if "tokenizer" in old and old == {"mask_id": new.get("mask_id"), "tokenizer": tokenizer.file_sha256}:
            now["masking"] = old


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
    lines = [f"  {line}" for line in differences(then, now) if not line.startswith("learning_rates:")]
    if then.get("learning_rates") != now.get("learning_rates"):
        rates = [f"  {line}" for line in differences(config_then, config_now) if line.startswith(_RATES)]
        lines += rates or ["  the learning rates (optimizer.lr, schedule, run.total, lengths of phases)"]
    return list(dict.fromkeys(lines))


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
    intact = newest_intact(checkpoints, before=found.name)
    if intact is None:
        raise IntegrityError(f"{'; '.join(problems[:4])}; there is no intact checkpoint in {checkpoints}")
    return intact, {"damaged": found.name, "problems": problems[:4], "used": intact.name}


def _first_save(run: Path) -> tuple[Path, dict] | None:
    """The run's only checkpoint, where its launch was killed after that had its name and before `latest` named it.

    It can be told from a `latest` that was lost: the steps are in metrics.jsonl, and no save that has ended is.
    """
    checkpoints = run / "checkpoints"
    names = checkpoint.saved_names(checkpoints)
    if len(names) != 1 or os.path.lexists(checkpoints / LATEST):
        return None
    last, saved = recorded(run / "metrics.jsonl")
    if saved or last < max(1, step_of(names[0])):
        return None
    return checkpoints / names[0], {"damaged": LATEST, "problems": ["the first save was not quite finished"],
                                    "used": names[0]}


def _check_unsaved(plan) -> None:
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
        then = _plan_of(config, plan).timeline.history(last)
    except UserError as error:
        raise UserError(f"{run}/config.yaml: is of another run, which saved nothing, or can no longer be read as its "
                        f"config ({error}); train in another run.dir, or {away}") from None
    now = plan.timeline.history(last)
    if lines := _changed_past(then, now, config, schema.to_dict(plan.config)):
        raise UserError("\n".join([f"{run}: another run was begun here, which saved nothing (recorded -> asked for):",
                                   *lines, f"Give these keys back as recorded, train in another run.dir, or {away}."]))


def _plan_of(config: dict, plan):
    """The plan of a recorded config, on the machine and with the topology of `plan`."""
    theirs, parallel = schema.build(Config, config), plan.config.parallel
    return make_plan(replace(theirs, batch=replace(theirs.batch, micro_size=1), parallel=parallel,
                             performance=plan.config.performance), parallel.tensor * parallel.pipeline)


def _state_of(found: Path) -> dict:
    """run_state.json; where it is damaged, the error offers an intact checkpoint."""
    try:
        return checkpoint.read_run_state(found)
    except IntegrityError as error:
        raise damaged(found, [str(error)]) from None


def _check_trunk(plan, state: dict, found: Path) -> None:
    changed = differences(state["history"]["model"], plan.timeline.history(0)["model"], "model")
    if changed:
        raise UserError("\n".join([f"{found}: these weights are of another trunk (theirs -> asked for):",
                                   *(f"  {line}" for line in changed), "Give the model its keys."]))


def _last_precision(history: dict) -> dict:
    """That of a history's last step."""
    recorded = history.get("precision", {})
    recorded = recorded[-1] if isinstance(recorded, list) else recorded
    return {key: value for key, value in recorded.items() if key != "until"}


def _changes(plan, run: str) -> dict[str, list]:
    """What the config changes against config.yaml of the last launch, by key."""
    recorded = last_config(run)
    return changed_keys(recorded, schema.to_dict(plan.config)) if recorded else {}


def changed_keys(then, now, where: str = "") -> dict[str, list]:
    """Key -> [recorded, asked for], keys dotted; lists of another length as a whole."""
    if isinstance(then, dict) and isinstance(now, dict):
        return {key: value for name in sorted(then.keys() | now.keys()) for key, value in changed_keys(
            then.get(name), now.get(name), f"{where}.{name}" if where else str(name)).items()}
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return {key: value for number, pair in enumerate(zip(then, now, strict=True))
                for key, value in changed_keys(*pair, f"{where}.{number}").items()}
    return {} if then == now else {where: [then, now]}
