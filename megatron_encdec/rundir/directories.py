"""Directories that are complete or absent: filled beside, made durable, renamed.

    1. `with new_directory(out, verb) as work:`     by one process
    2. `check_free`, `begin_directory`, `finish_directory`     the steps of it, where one of several ranks does them
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import fsync_tree, replace_durably


def check_free(directory: Path) -> None:
    """Raises `UserError` unless a new directory can have that name: nothing is there, or an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is there already; name a directory that is not, or remove it")


def begin_directory(directory: Path, verb: str) -> Path:
    """An empty directory beside `directory`, for `finish_directory` to give its name; what a killed process left there
    is removed. Raises `UserError` where it cannot be made."""
    work = workplace(directory, verb)
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{work.parent}: cannot be written to ({error.strerror})") from None
    return work


def workplace(directory: Path, verb: str) -> Path:
    """Where `verb` makes `directory`."""
    whole = Path(os.path.abspath(directory))
    return whole.parent / f".{whole.name}.{verb}.tmp"


def finish_directory(work: Path, directory: Path) -> None:
    """Make what is in `work` durable and give it its name, where an empty directory may be."""
    fsync_tree(work)
    if directory.is_dir():
        directory.rmdir()
    replace_durably(work, directory)


@contextlib.contextmanager
def new_directory(directory: Path, verb: str) -> Iterator[Path]:
    """A directory to fill, which becomes `directory` at the end of the context, or is gone."""
    check_free(directory)
    work = begin_directory(directory, verb)
    try:
        yield work
        finish_directory(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
