"""The folders of a sweep: which runs are finished, failed or still to do, and what each file says.

    <dataset>/grid.json                    {"runs": [...]}: all runs planned here, so that a report knows what it misses
    <dataset>/<run>/results.json           the run is finished, and is never repeated
    <dataset>/<run>/failure.json           {"reason", "when", "traceback"}: it failed; repeated only when asked to
    <dataset>/<run>/run.lock               held while a process works on it, let go of however that process ends

A run with neither results nor a failure was never begun, or was killed: it is done (again).

    1. `state_of(directory)`                FINISHED, FAILED or TODO
    2. `claim(directory)`                   the lock, or None where another process has it
    3. `write_results`, `write_failure`     complete or absent
    4. `plan(directories)`                  grid.json of every dataset among them
"""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.rundir.lock import FolderLock, InUse

FINISHED, FAILED, TODO = "finished", "failed", "todo"
RESULTS, FAILURE, GRID = "results.json", "failure.json", "grid.json"


def state_of(directory: Path) -> str:
    """FINISHED, FAILED or TODO."""
    if (directory / RESULTS).is_file():
        return FINISHED
    return FAILED if (directory / FAILURE).is_file() else TODO


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[InUse | None]:
    """Hold the run's folder while the context lasts; gives None then, or says who has it."""
    with contextlib.ExitStack() as stack:
        held = None
        try:
            stack.enter_context(FolderLock(directory, "results"))
        except InUse as refused:
            held = refused
        yield held


def write_results(directory: Path, results: dict) -> None:
    """Finish the run; a failure of an earlier attempt is forgotten."""
    write_json_atomic(directory / RESULTS, results)
    (directory / FAILURE).unlink(missing_ok=True)


def write_failure(directory: Path, reason: str, traceback: str | None = None) -> None:
    """Record why the run failed: `reason` in one line, `traceback` where there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(directory / FAILURE, {"reason": " ".join(reason.split()) or "no reason given",
                                            "when": time.strftime("%Y-%m-%d %H:%M:%S"), "traceback": traceback})


def reason_of(directory: Path) -> str:
    """Why the run of a failed state failed."""
    try:
        return str(json.loads((directory / FAILURE).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return "its failure.json cannot be read"


def _planned(path: Path) -> list[str]:
    """The runs in a grid.json; none where there is no such file."""
    try:
        return list(dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))["runs"]))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}), so that the runs planned there are "
                        "not known; mend it, or delete it to have it list the runs of this sweep alone") from None


def plan(directories: Iterable[Path]) -> None:
    """Add runs to the grid.json of their datasets, so that a report knows what it misses.

    Raises `UserError` where one is there that cannot be read: what it listed would be lost.
    """
    by_dataset: dict[Path, list[str]] = defaultdict(list)
    for directory in directories:
        by_dataset[directory.parent].append(directory.name)
    for dataset, names in by_dataset.items():
        dataset.mkdir(parents=True, exist_ok=True)
        known = _planned(dataset / GRID)
        if set(names) - set(known):
            write_json_atomic(dataset / GRID, {"runs": list(dict.fromkeys([*known, *names]))})
