"""Lists of numbers that took a while to make, kept in files by content: whichever run needs them first makes them.

    1. the key is a hash of all that they are made of: nothing that is there can be wrong, and no file is ever changed
    2. a file that is there and whole is read; else its rows are made, and the file is complete or absent
    3. whoever writes one removes those that nobody has read for `KEPT_DAYS`

Workers that want the same rows at the same time each make them, on a core of their own, which takes no longer than
waiting would. Whoever deletes the folder loses nothing but time. Legend of shapes: N rows, T numbers of all of them.
"""

import contextlib
import io
import os
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_encdec.rundir.files import write_atomic

KEPT_DAYS = 30
# What reading a damaged file may raise: zipfile takes flipped bits for other methods, versions and passwords.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_LENGTHS = "lengths"
Rows = dict[str, list]  # name -> [N] lists


def kept_rows(path: Path, widths: dict[str, int], make: Callable[[], Rows]) -> Rows:
    """The rows in the file at `path`; where that is not there, or damaged, what `make` gives, which it then holds.
    widths: by name, how many numbers an entry of a row is (above 1: a tuple); all names have rows of one length."""
    if (kept := _read(path, widths)) is not None:
        with contextlib.suppress(OSError):
            os.utime(path)
        return kept
    kept = make()
    with contextlib.suppress(OSError):  # a full disk: the next run makes them again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _packed(kept, widths))
        _remove_old(path.parent)
    return kept


def _remove_old(folder: Path) -> None:
    for file in folder.glob("*.npz"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - file.stat().st_mtime > KEPT_DAYS * 24 * 3600:
                file.unlink()


def _packed(found: Rows, widths: dict[str, int]) -> bytes:
    arrays = {_LENGTHS: np.array([len(row) for row in found[next(iter(widths))]], np.int64)}
    for name, width in widths.items():
        values = np.array([one for row in found[name] for one in row], np.int32)
        arrays[name] = values.reshape(-1, width) if width > 1 else values
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _read(path: Path, widths: dict[str, int]) -> Rows | None:
    """What is kept at `path`; None where that is not there, or damaged (a checksum of each array is in it)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        lengths = arrays.pop(_LENGTHS)
    except _DAMAGED:
        return None
    if arrays.keys() != widths.keys():
        return None
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    found = {}
    for name, values in arrays.items():
        flat = [tuple(one) for one in values.tolist()] if widths[name] > 1 else values.tolist()
        found[name] = [flat[start:end] for start, end in zip(starts, ends, strict=True)]
    return found
