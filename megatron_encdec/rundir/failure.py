"""failure.json of a run's folder: why the work on it failed (metrics.jsonl holds what was done, and nothing else).

    1. `with noted_failure(directory, ...):`       what goes wrong inside is written down; of pretraining
    2. `write_failure`, `read_failure`, `forget_failure`

It stands from the end of the launch that failed until one that gets to work again. A process that was killed writes
none: its run.lock still names it.
"""

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_encdec.platform.errors import RunFailed, UserError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.rundir.lock import Claim

NAME = "failure.json"


def write_failure(directory: Path, reason: str, trace: str | None = None, **facts: int) -> None:
    """Record why the work on `directory` failed: `reason` in one line, the traceback where there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(directory / NAME, {"reason": " ".join(reason.split()) or "no reason given",
                                         "when": time.strftime("%Y-%m-%d %H:%M:%S"), "traceback": trace, **facts})


def read_failure(directory: str | Path) -> dict | None:
    """`{"reason", "when", "traceback", ...}`; None where the last launch did not fail, or none can be read."""
    try:
        record = json.loads((Path(directory) / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("reason"), str) else None


def forget_failure(directory: Path) -> None:
    """The run is at work again."""
    (directory / NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def noted_failure(directory: Path, claim: Claim, step: Callable[[], int]) -> Iterator[None]:
    """An error that leaves the context is recorded, with the `step()` that was done last, and goes on up. Nothing is
    written once another launch has taken the directory."""
    try:
        yield
    except Exception as error:
        said = isinstance(error, (RunFailed, UserError))  # one line for people, without a traceback
        reason = str(error) if said else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # a disk that is full or away must not hide why the work ends
            if not claim.lost():
                write_failure(directory, reason, None if said else traceback.format_exc(), step=step())
        raise
