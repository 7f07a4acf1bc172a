"""Names in a checkpoints directory: step_00001000 for the one of step 1000, `latest` for the newest; RUN_DIR[@STEP]."""

import os
import re
from pathlib import Path

from megatron_encdec.platform.errors import UserError

LATEST = "latest"
_NAME = re.compile(r"step_\d{8,}")


def name_of(step: int) -> str:
    """Directory name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step of a checkpoint's directory name."""
    return int(name.removeprefix("step_"))


def is_name(name: str) -> bool:
    """Whether `name` is one of a finished checkpoint."""
    return _NAME.fullmatch(name) is not None


def split_step(run: str) -> tuple[str, int | None]:
    """`RUN_DIR[@STEP]` as path and step (None: the newest). A directory that is there under the whole name is meant.
    Raises `UserError` where there is none and what follows the last @ is no step number."""
    path, at, step = run.rpartition("@")
    if not at or os.path.isdir(run):
        return run, None
    if not (path and step.isascii() and step.isdigit()):
        raise UserError(f"{run}: there is no such directory, and read as RUN_DIR@STEP it has no step number after the "
                        f"last @ ({step!r})" if path else f"{run}: there is no such directory, and none is named "
                        "before the @")
    return path, int(step)


def listed(names: list[str], most: int = 5) -> str:
    """`names` for people: the newest ones, and how many more there are."""
    earlier = f"{len(names) - most} earlier ones and " if len(names) > most else ""
    return earlier + ", ".join(names[-most:]) if names else "none"


def saved_names(checkpoints: Path) -> list[str]:
    """Names of the finished checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((entry.name for entry in checkpoints.iterdir() if is_name(entry.name) and entry.is_dir()),
                  key=step_of)
