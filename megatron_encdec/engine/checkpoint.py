"""Checkpoints: megatron.core's distributed format, one layout whatever the parallel sizes.

    step_00001000/           written as .step_00001000.tmp, renamed when whole and durable
        *.distcp, .metadata, common.pt, metadata.json      weights and optimizer, reshardable (storage.py)
        run_state.json                                      step, phase, counters, history hash, ... (run_state.py)
        checksums.json                                      size and sha256 of every file (integrity.py)
    latest                   name of the newest, written last

    1. `newest`, `pointed`, `directory_of`     finding one (names.py: `saved_names`, `name_of`)
    2. `load(...)`, `load_weights(...)`         into a trunk and optimizer of any topology
    3. `publish`, `prune`, `clean`              the directory's part of saving (saver.py)
"""

import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from megatron_encdec.engine import integrity
from megatron_encdec.engine.boxes import FP8_PREFIX, STATE_PREFIX, Box, wanted
from megatron_encdec.engine.names import LATEST, listed, name_of, saved_names, split_step, step_of
from megatron_encdec.engine.optimizer import set_update_count
from megatron_encdec.engine.storage import read_boxes, read_update_count, stored_dtypes
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import fsync_directory, replace_durably, write_atomic

_MASTERS = f"{STATE_PREFIX}.param."


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
        raise UserError(f"{path}@{step}: no checkpoint of step {step}; there are {listed(saved_names(checkpoints))}")
    return found


def load(checkpoint: Path, trunk, optimizer=None) -> None:
    """Fill `trunk` (and `optimizer`, if given) from `checkpoint`, whatever topology wrote it; collective.

    Every byte is checked first: `IntegrityError` on every rank, naming the file and the newest intact checkpoint.
    Weights of another dtype come from the fp32 masters. FP8's scales begin anew where the checkpoint has none.
    """
    integrity.check(checkpoint)
    dtypes = stored_dtypes(checkpoint)

    def source(box):
        other = dtypes.get(box.key) not in (None, box.values.dtype)
        return _from_master(box, dtypes) if other and not box.key.startswith(STATE_PREFIX) else box

    read_boxes(checkpoint, [source(box) for box in wanted(trunk, optimizer)
                            if box.key in dtypes or not box.key.startswith(f"{FP8_PREFIX}.")])
    if optimizer is not None:
        set_update_count(optimizer, read_update_count(checkpoint))


def load_weights(checkpoint: Path, trunk, optimizer=None) -> None:
    """Fill `trunk`, and the fp32 masters in `optimizer`, with the weights of `checkpoint` alone; collective.

    They come from the masters, which they were rounded from, where there are some. Moments and update count stay as
    they are; a checkpoint without any, such as an import's, will do.
    """
    integrity.check(checkpoint)
    names = stored_dtypes(checkpoint)
    read_boxes(checkpoint, [_from_master(box, names) for box in wanted(trunk, None)])
    if optimizer is not None:  # by itself: where it holds an fp32 run's weights, its boxes are the same
        read_boxes(checkpoint, [_from_master(box, names) for box in wanted(trunk, optimizer)
                                if box.key.startswith(_MASTERS)])


def _from_master(box: Box, names: Collection[str]) -> Box:
    """The box of a weight or master, read from the checkpoint's master if that is among its `names`."""
    weight = box.key.removeprefix(_MASTERS)
    return replace(box, key=_MASTERS + weight if _MASTERS + weight in names else weight)


def publish(temporary: Path, final: Path) -> None:
    """Give a whole, durable checkpoint its name, then let `latest` name it. One process calls this."""
    checkpoints = final.parent
    fsync_directory(temporary)
    grave = checkpoints / f".{final.name}.deleted"
    if final.exists():  # the same step again, after a resume from an older checkpoint
        _point_elsewhere(checkpoints, final.name)
        shutil.rmtree(grave, ignore_errors=True)
        replace_durably(final, grave)
    replace_durably(temporary, final)
    write_atomic(checkpoints / LATEST, final.name + "\n")
    shutil.rmtree(grave, ignore_errors=True)


def _point_elsewhere(checkpoints: Path, name: str) -> None:
    """`latest` must name a whole checkpoint at every moment, also while the one of `name` is replaced."""
    pointer = checkpoints / LATEST
    if not pointer.exists() or pointer.read_text(errors="replace").strip() != name:
        return
    earlier = [other for other in saved_names(checkpoints) if step_of(other) < step_of(name)]
    if earlier:
        write_atomic(pointer, earlier[-1] + "\n")
    else:
        pointer.unlink()
        fsync_directory(checkpoints)


def prune(checkpoints: Path, keep: int, always: set[int], up_to: int | None = None) -> list[str]:
    """Delete all but the newest `keep` checkpoints, those of the steps in `always` apart; returns names.

    Steps beyond `up_to` are neither counted nor deleted: a run that went on from an older one will write them again.
    """
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
