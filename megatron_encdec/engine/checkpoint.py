"""Checkpoints: megatron.core's distributed format, one layout whatever the parallel sizes.

    step_00001000/           written as .step_00001000.tmp, renamed when whole
        *.distcp, .metadata, common.pt, metadata.json      weights and optimizer, reshardable
        run_state.json                                      step, phase, counters, history hash, topology, versions
    latest                   name of the newest, written last

    1. `save(...)`           all ranks write their part; rank 0 adds run_state.json, renames, moves `latest`
    2. `load(...)`           into a trunk and optimizer of any topology
    3. `newest`, `directory_of`, `read_run_state`, `prune`
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_encdec.engine.optimizer import restore
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import fsync_directory, replace_durably, write_atomic, write_json_atomic

FORMAT = 1
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable",
             "distrib_optim_fully_reshardable_mem_efficient": False}


def name_of(step: int) -> str:
    """Directory name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def newest(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where nothing was saved."""
    pointer = checkpoints / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    if not re.fullmatch(r"step_\d{8,}", name) or not (checkpoints / name).is_dir():
        raise IntegrityError(f"{pointer}: names {name!r}, which is not a checkpoint beside it; write the name of "
                             f"an existing one into it (found: {', '.join(saved_names(checkpoints)) or 'none'})")
    return checkpoints / name


def saved_names(checkpoints: Path) -> list[str]:
    """Names of the finished checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(entry.name for entry in checkpoints.iterdir() if re.fullmatch(r"step_\d{8,}", entry.name))


def directory_of(run: str) -> Path:
    """The checkpoint that `RUN_DIR[@STEP]` means."""
    path, _, step = run.partition("@")
    checkpoints = Path(path) / "checkpoints"
    if not step:
        found = newest(checkpoints)
        if found is None:
            raise UserError(f"{path}: no checkpoint there ({checkpoints}/latest is missing)")
        return found
    if not step.isdigit():
        raise UserError(f"{run}: after @ comes a step number, found {step!r}")
    found = checkpoints / name_of(int(step))
    if not found.is_dir():
        raise UserError(f"{run}: no checkpoint of step {step}; there are "
                        f"{', '.join(saved_names(checkpoints)) or 'none'}")
    return found


def read_run_state(checkpoint: Path) -> dict:
    """run_state.json of a checkpoint."""
    path = checkpoint / "run_state.json"
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; this checkpoint is not whole") from None
    except json.JSONDecodeError as error:
        raise IntegrityError(f"{path}: not valid JSON ({error}); this checkpoint is damaged") from None
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {state.get('format')!r}; this version reads {FORMAT}")
    return state


def _sharded_state(trunk, optimizer, loading: bool) -> dict:
    weights = trunk.sharded_state_dict(metadata=_METADATA)
    state = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=_METADATA)
    return state


def save(checkpoints: Path, trunk, optimizer, run_state: dict) -> Path:
    """Write the checkpoint of `run_state["step"]`; it is there for all ranks, durable, when this returns."""
    final = checkpoints / name_of(run_state["step"])
    temporary = checkpoints / f".{final.name}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    mcore.dist_checkpointing.save(_sharded_state(trunk, optimizer, loading=False), str(temporary))
    dist.barrier()
    if dist.get_rank() == 0:
        write_json_atomic(temporary / "run_state.json", {"format": FORMAT, **run_state})
        _make_durable(temporary)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        replace_durably(temporary, final)
        write_atomic(checkpoints / "latest", final.name + "\n")
    dist.barrier()
    return final


def _make_durable(directory: Path) -> None:
    for entry in directory.iterdir():
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    fsync_directory(directory)


def load(checkpoint: Path, trunk, optimizer=None) -> None:
    """Fill `trunk` (and `optimizer`, if given) from `checkpoint`, whatever topology wrote it."""
    state = mcore.dist_checkpointing.load(_sharded_state(trunk, optimizer, loading=True), str(checkpoint))
    trunk.load_state_dict(state["model"])
    if optimizer is not None:
        restore(optimizer, state["optimizer"])


def prune(checkpoints: Path, keep: int, always: set[int]) -> list[str]:
    """Delete all but the newest `keep` checkpoints, those of the steps in `always` apart; returns names."""
    names = saved_names(checkpoints)
    old = [name for name in names[:-keep] if int(name.removeprefix("step_")) not in always]
    for name in old:
        grave = checkpoints / f".{name}.deleted"
        os.replace(checkpoints / name, grave)  # so that a crash halfway leaves no half checkpoint under its name
        shutil.rmtree(grave, ignore_errors=True)
    return old
