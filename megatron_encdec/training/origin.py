"""Where a run goes on from: its own newest checkpoint, another run's (a fork), another's weights, or nowhere.

    1. `resolve(...)`, `weights_of(...)`    `run.from` made definite; the part of it that belongs to the history
    2. `find(plan, fallback)`               the checkpoint to load, checked against the plan  ->  `Origin`
    3. `refusal(...)`                       what of the past differs: one line a key, recorded and asked for

The history up to the checkpoint's step must be the recorded one, by its hash; everything later, and everything
cosmetic, may change, and what changed is in `Origin.changed`. So may the precision: the history keeps in which one
each step was done.
"""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.integrity import damaged, newest_intact, verify
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.lineage import differences, history_hash
from megatron_encdec.training.config import Config, From, RunSettings

_RATES = ("optimizer.lr", "schedule", "phases", "run.total")  # what the learning rates follow from


@dataclass(frozen=True)
class Origin:
    """What a run starts with. `kind`: `new` (run.seed), `resume`, `fork`, `weights`.

    changed: key -> [recorded, asked for] of what differs from the last launch and may. parent: the run forked or
    begun from. fallback: the damaged checkpoint passed over, and what is wrong with it.
    """

    kind: str
    checkpoint: Path | None = None
    state: dict | None = None
    changed: dict[str, list] = field(default_factory=dict)
    parent: dict | None = None
    fallback: dict | None = None


def resolve(run: RunSettings) -> From | None:
    """`run.from` with its step: the one recorded in run.dir, if the run has begun, else the newest there is now."""
    if run.from_ is None or run.from_.step is not None:
        return run.from_
    recorded = (_recorded(run.dir).get("run") or {}).get("from") or {}
    if checkpoint.saved_names(Path(run.dir) / "checkpoints") and recorded.get("path") == run.from_.path:
        return replace(run.from_, step=recorded.get("step"))
    return replace(run.from_, step=checkpoint.read_run_state(checkpoint.directory_at(run.from_.path, None))["step"])


def weights_of(config: Config) -> dict | None:
    """Step and history hash that the initial weights have, if not drawn from run.seed; part of the history."""
    if config.run.from_ is None:
        return None
    state = _parent_state(config.run.from_)
    if state is None:  # the parent is gone; the run itself remembers
        newest = checkpoint.newest(Path(config.run.dir) / "checkpoints")
        if newest is None:
            checkpoint.directory_at(config.run.from_.path, config.run.from_.step)  # says what is missing
        return checkpoint.read_run_state(newest)["history"].get("weights")
    if config.run.from_.state == "weights":
        return {"step": state["step"], "history_hash": state["history_hash"]}
    return state["history"].get("weights")  # a fork has its parent's initial weights


def find(plan, fallback: bool = False) -> Origin:
    """Where the run of `plan` goes on from; one process, reads small files only unless `fallback`.

    fallback: verify the newest checkpoint, and take the newest intact one instead where it is damaged. Raises
    `UserError` where the config changes the past, `IntegrityError` where a checkpoint is unreadable.
    """
    run = plan.config.run
    newest, passed_over = _newest(Path(run.dir) / "checkpoints", fallback)
    if newest is not None:
        state = _state_of(newest)
        check_history(plan, state, newest, Path(run.dir))
        return Origin("resume", newest, state, _changes(plan, run.dir), None, passed_over)
    if run.from_ is None:
        return Origin("new", fallback=passed_over)
    found = checkpoint.directory_at(run.from_.path, run.from_.step)
    state = _state_of(found)
    parent = {"path": run.from_.path, "step": state["step"], "history_hash": state["history_hash"],
              "state": run.from_.state}
    if run.from_.state == "weights":
        _check_trunk(plan, state, found)
        return Origin("weights", found, state, {}, parent, passed_over)
    check_history(plan, state, found, Path(run.from_.path))
    then, now = _last_precision(state["history"]), plan.config.precision.identity()
    return Origin("fork", found, state, changed_keys(then, now, "precision"), parent, passed_over)


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
        raise UserError(refusal(found, state["history"], history, _recorded(run),
                                schema.to_dict(plan.config)))


def _keep_recorded_masking(history: dict, recorded: dict, tokenizer) -> None:
    """Earlier versions put the sha256 of the tokenizer's file into the history, where the ids that masks depend on
    stand now: of the same file both say the same."""
    for then, now in zip(recorded["phases"], history["phases"], strict=False):
        old, new = then["masking"] or {}, now["masking"] or {}
        if "tokenizer" in old and old == {"mask_id": new.get("mask_id"), "tokenizer": tokenizer.file_sha256}:
            now["masking"] = old


def refusal(found: Path, then: dict, now: dict, config_then: dict, config_now: dict) -> str:
    """What differs, one line a key, and what to do. Hashes of learning rates say nothing to people: the keys they
    follow from are shown in their place, where they are on record."""
    lines = [f"  {line}" for line in differences(then, now) if not line.startswith("learning_rates:")]
    if then.get("learning_rates") != now.get("learning_rates"):
        rates = [f"  {line}" for line in differences(config_then, config_now) if line.startswith(_RATES)]
        lines += rates or ["  the learning rates (optimizer.lr, schedule, run.total, lengths of phases)"]
    step = then.get("step")
    return "\n".join([
        f"{found}: the config changes what determined this state (recorded -> asked for):", *dict.fromkeys(lines),
        f"Steps 1..{step} are done and cannot change. Give these keys back as recorded; or train in another run.dir "
        "from the start; or begin a new history there with these weights: "
        f"{shlex.quote(f'run.from.path={found.parent.parent}')} run.from.step={step} run.from.state=weights"])


def _newest(checkpoints: Path, fallback: bool) -> tuple[Path | None, dict | None]:
    """The checkpoint to resume from, and which damaged one was passed over for it."""
    if not fallback:
        try:
            return checkpoint.newest(checkpoints), None
        except IntegrityError as error:
            raise damaged(checkpoints / "latest", [str(error)]) from None
    try:
        newest = checkpoint.newest(checkpoints)
        if newest is None:
            return None, None
        problems, name = verify(newest), newest.name
    except IntegrityError as error:
        newest, problems, name = None, [str(error)], "latest"
    if not problems:
        return newest, None
    intact = newest_intact(checkpoints, skip=[name])
    if intact is None:
        raise IntegrityError(f"{'; '.join(problems[:4])}; there is no intact checkpoint in {checkpoints}")
    return intact, {"damaged": name, "problems": problems[:4], "used": intact.name}


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
    recorded = _recorded(run)
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


def _recorded(run: str | Path) -> dict:
    """config.yaml of a run directory, in the form that today's config has; {} where there is none."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return schema.to_dict(schema.build(Config, schema.load_yaml(path)))
    except UserError:  # of another version: its keys as they stand
        return schema.load_yaml(path)


def _parent_state(origin: From) -> dict | None:
    try:
        return checkpoint.read_run_state(checkpoint.directory_at(origin.path, origin.step))
    except UserError:
        return None
