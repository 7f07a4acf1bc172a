"""What a worker of a sweep does: run after run in one process, so that what one has loaded serves the next.

A run is done under the lock of its folder, and its results or its failure are written here. A worker that is stopped
in the middle of a run leaves neither: that run is done again. Neither does one whose lock another sweep has taken over
(this process was stopped, or its disk away, for a minute): the run is that sweep's then.
"""

import contextlib
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_encdec.finetune.results_tree import FINISHED, state_of, write_failure, write_results
from megatron_encdec.platform.children import tell
from megatron_encdec.platform.errors import RunFailed, UserError
from megatron_encdec.rundir.lock import Claim, FolderLock, InUse

LOG = "log.txt"  # in the run's folder: what the run printed
SECONDS_BETWEEN_STEPS = 0.2  # between messages of progress


def make_runner(function: str) -> Callable[[Any], tuple[str, Any]]:
    """A function that does a run by calling `function` ("module:name", as in `Sweep`).

    It returns ("finished", scores or None), ("failed", reason), ("mistake", what), ("elsewhere", who has it) or, where
    the run was taken over while it was done here, ("taken", who has it). A mistake of the user's (`UserError`, a
    package that is missing) is no result of the run: nothing is recorded.
    """
    def do(run: Any) -> tuple[str, Any]:
        try:
            with FolderLock(run.directory, "results", patience=None) as lock:
                try:
                    return _do_alone(function, run, lock.claim)
                except InUse as lost:
                    return "taken", lost.who
        except InUse as refused:
            return "elsewhere", refused.who

    return do


def _do_alone(function: str, run: Any, claim: Claim) -> tuple[str, Any]:
    directory = run.directory
    if state_of(directory) == FINISHED:  # by another sweep, since ours began
        return "finished", None
    try:
        with _output_to(directory / LOG):
            results = pkgutil.resolve_name(function)(run, _reporter(claim))
    except InUse:
        raise
    except (UserError, ImportError) as error:
        return "mistake", str(error)
    except Exception as error:  # one run's failure is never another's
        claim.check()
        reason = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        write_failure(directory, reason, traceback.format_exc())
        return "failed", reason
    claim.check()
    write_results(directory, results)
    return "finished", {split: results[split]["score"] for split in ("validation", "test")}


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Everything that is printed, by C code and child processes too, goes to the file at `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


def _reporter(claim: Claim) -> Callable[[int, int], None]:
    """What a run calls at each step, and again before it writes: `report(step, total)`. Raises `InUse` where its folder
    is another process's now."""
    last = 0.0

    def report(step: int, total: int) -> None:
        nonlocal last
        if step == total or time.monotonic() - last >= SECONDS_BETWEEN_STEPS:
            last = time.monotonic()
            claim.check()
            tell((step, total))

    return report
