"""Checkpoints: megatron.core's distributed format, one layout whatever the parallel sizes.

    step_00001000/           written as .step_00001000.tmp, renamed when whole and durable
        *.distcp, .metadata, common.pt, metadata.json      weights and optimizer, reshardable (storage.py)
        run_state.json                                      step, phase, counters, history hash, ... (`RunState`)
        checksums.json                                      size and sha256 of every file (integrity.py)
    latest                   name of the newest, written last

Loading one into a trunk is loading.py's: this module needs no megatron.core, so that a plan is made in a moment.

    1. `RunState`, `read_run_state`             where a run stood, what determined that state, and what wrote it
    2. `newest`, `pointed`, `directory_of`     finding one (integrity.py: `saved_names`, `name_of`)
    3. `publish`, `prune`, `clean`              the directory's part of saving (saver.py)
"""

import json
import os
import platform as python_platform
import shlex
import shutil
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_encdec import __version__
from megatron_encdec.engine.integrity import LATEST, gone, listed, name_of, saved_names, split_step, step_of
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import fsync_directory, replace_durably, write_atomic
from megatron_encdec.rundir.metrics import recorded

FORMAT = 2  # of a checkpoint; 1 had no checksums


@dataclass(frozen=True)
class RunState:
    """The state after `step`; samples, tokens and targets are those consumed so far, over all phases.
    phase: its number, from 0. history: what determined this state (training/stretches.py), history_hash its sha256.
    skipped: steps without an update. metrics_position: how long metrics.jsonl was. imported: an import's notes,
    merged: a merge's."""

    step: int
    phase: int
    phase_name: str
    objective: str
    samples: int
    tokens: int
    targets: int
    history_hash: str
    history: dict[str, Any]
    data_fingerprints: list[str]
    tokenizer_fingerprint: str | None
    topology: dict[str, Any]
    versions: dict[str, str]
    skipped: int = 0
    metrics_position: dict[str, int] | None = None
    imported: dict[str, Any] | None = None
    merged: dict[str, Any] | None = None
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items()
                if name not in ("imported", "merged") or value is not None}

    @property
    def is_beginning(self) -> bool:
        """Whether it is one to train on from, without phases of its own: an import or a merge."""
        return self.imported is not None or self.merged is not None


def read_run_state(checkpoint: Path) -> RunState:
    """run_state.json of `checkpoint`. Raises `IntegrityError` where it is missing or damaged."""
    path = checkpoint / "run_state.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not checkpoint.exists():
            raise gone(checkpoint) from None
        raise IntegrityError(f"{path}: missing; this checkpoint is not whole") from None
    except ValueError as error:  # not JSON, or not even text
        raise IntegrityError(f"{path}: not valid JSON ({error}); this checkpoint is damaged") from None
    recorded = found.get("format") if isinstance(found, dict) else None
    if recorded != FORMAT:
        raise UserError(f"{path}: checkpoint format {recorded!r}; this version reads {FORMAT}")
    if missing := [field.name for field in fields(RunState) if field.default is MISSING and field.name not in found]:
        raise IntegrityError(f"{path}: has no {', '.join(missing)}; this checkpoint is damaged")
    return RunState(**{field.name: found[field.name] for field in fields(RunState) if field.name in found})


def versions() -> dict[str, str]:
    """Package versions that bit-equality depends on."""
    from megatron_encdec.platform import megatron as mcore

    return {"megatron_encdec": __version__, "torch": torch.__version__, "megatron_core": mcore.__version__,
            "numpy": numpy.__version__, "python": python_platform.python_version()}


def newest(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where nothing was saved. Raises `IntegrityError` where checkpoints
    are there, or once were, and `latest` does not name one of them."""
    pointer, name = checkpoints / LATEST, pointed(checkpoints)
    names = saved_names(checkpoints)
    while (later := pointed(checkpoints)) != name:  # a run is saving meanwhile: what was listed is not what it names
        name, names = later, saved_names(checkpoints)
    if name is None and not names:
        return None
    mend = f"write the name of one into {pointer}" if names else "bring its checkpoints back"
    if name is None:
        raise IntegrityError(f"{checkpoints}: holds {listed(names)}, but its file {LATEST} is missing; {mend}")
    if name not in names:
        raise IntegrityError(f"{pointer}: names {name!r}, which is not a checkpoint beside it (found: "
                             f"{listed(names)}); {mend}")
    return checkpoints / name


def pointed(checkpoints: Path) -> str | None:
    """What stands in `latest`; None where there is no such file. Raises `IntegrityError` where it cannot be read."""
    for path, what in ((checkpoints, "a directory"), (checkpoints / LATEST, "a file")):
        if path.is_symlink() and not path.exists():
            raise IntegrityError(f"{path}: is a link to {os.readlink(path)}, which is not there; bring that back, or "
                                 f"make {path.name} {what}")
    if checkpoints.exists() and not checkpoints.is_dir():
        raise IntegrityError(f"{checkpoints}: is not a directory; move it away")
    try:
        return (checkpoints / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UserError(f"{checkpoints.parent}: is a file, or lies in one, and no run directory; name "
                        "another") from None
    except OSError as error:
        raise IntegrityError(f"{checkpoints / LATEST}: cannot be read ({error.strerror}); move it away, and write a "
                             "file there that holds the name of a checkpoint") from None


def directory_of(run: str) -> Path:
    """The checkpoint that `RUN_DIR[@STEP]` means."""
    return directory_at(*split_step(run))


def directory_at(path: str, step: int | None) -> Path:
    """The checkpoint of `step` in the run directory `path`; None: the newest."""
    checkpoints = Path(path) / "checkpoints"
    if step is None:
        try:
            found = newest(checkpoints)
        except IntegrityError as error:
            raise IntegrityError(f"{error}; or name a step, as in {path}@1000") from None
        if found is None:
            raise UserError(f"{path}: no checkpoint there ({checkpoints} holds none)")
        return found
    found = checkpoints / name_of(step)
    if not found.is_dir():
        raise UserError(f"{path}@{step}: no checkpoint of step {step}; there are {listed(saved_names(checkpoints))}"
                        f"{_deleted(path, step)}")
    return found


def _deleted(run: str, step: int) -> str:
    """Why a checkpoint that was saved is not there any more, and how to have it again; "" where it never was saved."""
    if step not in recorded(Path(run) / "metrics.jsonl")[1]:
        return ""
    config = Path(run) / "config.yaml"
    keep = (schema.load_yaml(config).get("checkpoint") or {}).get("keep") if config.is_file() else None
    before = [step_of(name) for name in saved_names(Path(run) / "checkpoints") if step_of(name) < step]
    fork = f" --fork {shlex.quote(f'{run}@{before[-1]}')}" if before else ""
    return (f". It was saved, and deleted after newer ones: checkpoint.keep={keep} keeps the newest {keep}, beside the "
            f"ends of phases and the steps that checkpoint.steps names. To have it again, in another directory: "
            f"megatron-encdec pretrain {shlex.quote(str(config))} run.dir=OTHER{fork} --until {step}")


def publish(temporary: Path, final: Path, check: Callable[[], None] = lambda: None) -> None:
    """Give a whole, durable checkpoint its name, then let `latest` name it. One process calls this. check: raises where
    the directory is not this process's any more; called before each of the two."""
    checkpoints = final.parent
    fsync_directory(temporary)
    check()
    grave = checkpoints / f".{final.name}.deleted"
    if final.exists():  # the same step again, after a resume from an older checkpoint
        _point_elsewhere(checkpoints, final.name)
        shutil.rmtree(grave, ignore_errors=True)
        replace_durably(final, grave)
    replace_durably(temporary, final)
    check()
    write_atomic(checkpoints / LATEST, final.name + "\n")
    shutil.rmtree(grave, ignore_errors=True)


def _point_elsewhere(checkpoints: Path, name: str) -> None:
    """`latest` must name a whole checkpoint at every moment, also while the one of `name` is replaced."""
    if pointed(checkpoints) != name:
        return
    if earlier := [other for other in saved_names(checkpoints) if step_of(other) < step_of(name)]:
        write_atomic(checkpoints / LATEST, earlier[-1] + "\n")
    else:
        (checkpoints / LATEST).unlink()
        fsync_directory(checkpoints)


def prune(checkpoints: Path, keep: int, always: set[int], up_to: int | None = None) -> list[str]:
    """Delete all but the newest `keep` checkpoints, those of the steps in `always` apart; returns names.
    Steps beyond `up_to` are neither counted nor deleted: a run that went on from an older one will write them again."""
    names = [name for name in saved_names(checkpoints) if up_to is None or step_of(name) <= up_to]
    old = [name for name in names[:-keep] if step_of(name) not in always]
    for name in old:
        remove(checkpoints, name)
    return old


def remove(checkpoints: Path, name: str) -> None:
    """Delete one checkpoint; `latest` then names an earlier one, or goes with the last."""
    _point_elsewhere(checkpoints, name)
    grave = checkpoints / f".{name}.deleted"
    os.replace(checkpoints / name, grave)  # so that a crash halfway leaves no half checkpoint under its name
    shutil.rmtree(grave, ignore_errors=True)


def clean(checkpoints: Path) -> None:
    """Remove what a crash in the middle of a save or a deletion left behind."""
    for entry in checkpoints.glob(".step_*") if checkpoints.is_dir() else ():
        if entry.name.endswith((".tmp", ".deleted")):
            shutil.rmtree(entry, ignore_errors=True)
