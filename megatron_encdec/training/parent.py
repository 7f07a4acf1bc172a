"""`run.from`: which run and step a run begins with, and what of it belongs to the history.

    1. `resolve(run)`         its step made definite, so that the same command means the same checkpoint for ever
    2. `beginning(config)`    the part of the history that says what the state at step 0 was
    3. `last_config(run)`     config.yaml of the last launch on a run directory
"""

from dataclasses import replace
from pathlib import Path

from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.run_state import RunState, read_run_state
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import Config, From, RunSettings


def resolve(run: RunSettings) -> From | None:
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
