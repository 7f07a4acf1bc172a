"""Saving checkpoints beside training, and telling how it went.

    1. `Saver.save(...)`     copy this rank's part of the state to host memory; a thread of each rank goes on:
    2. directory             rank 0 makes `.step_N.tmp`
    3. files                 every rank writes, hashes and fsyncs its own
    4. index                 rank 0 adds .metadata, common.pt, metadata.json, run_state.json, checksums.json
    5. publish               fsync, rename to `step_N`, fsync, then `latest`; then old ones are deleted
    6. outcome               the same on all ranks: `Saver.poll()` and `Saver.wait()` hand it out

The threads talk over a gloo group of their own, so their messages never meet those of training. A failure on any
rank fails the save on all: the partial directory goes, `latest` stays, and the run decides what to do. Where another
launch has taken the run directory over, no rank writes there, and nothing is removed.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_encdec.engine.boxes import Box, HostCopy, owned
from megatron_encdec.engine.checkpoint import RunState, clean, prune, publish
from megatron_encdec.engine.integrity import CHECKSUMS, checksums_text, name_of
from megatron_encdec.engine.storage import Written, common_state, write_boxes, write_bytes, write_index
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import json_bytes
from megatron_encdec.rundir.lock import Claim


@dataclass(frozen=True)
class SaveEvent:
    """A finished save of `state`. `error` is None, or why there is no checkpoint; equal on all ranks but for times.
    seconds_blocked: how long `save` kept training; seconds_total: until the checkpoint was durable. bytes: of all
    files. pruned: names of the checkpoints deleted for it."""

    state: RunState
    path: Path
    seconds_blocked: float
    seconds_total: float
    bytes: int
    error: str | None = None
    pruned: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """One save: everything the thread needs, none of it shared with training."""

    run_state: RunState
    boxes: Iterable[Box]
    common: dict
    always: frozenset[int]
    delete: bool
    started: float


class Saver:
    """Saves `trunk` and `optimizer` (each may be None) into `checkpoints`, the newest `keep` kept; made collectively.

    asynchronous: `save` returns when the state is copied (docs/checkpoints.md says how much memory that takes); else
    when the checkpoint is there. write_timeout: seconds to wait for the slowest rank's disk until the save has failed.
    claim: on the run directory, where there is a lock.
    """

    def __init__(self, checkpoints: Path, trunk, optimizer, keep: int, asynchronous: bool = True,
                 write_timeout: float = 1800.0, claim: Claim | None = None):
        self._checkpoints, self._trunk, self._optimizer = checkpoints, trunk, optimizer
        self._keep, self._claim = keep, claim
        self._rank = dist.get_rank()
        alone = dist.get_world_size() == 1
        self._group = None if alone else dist.new_group(backend="gloo", timeout=timedelta(seconds=write_timeout))
        self._host = HostCopy(owned(trunk, optimizer)) if asynchronous else None
        self._thread: threading.Thread | None = None
        self._blocked: float | None = None  # seconds, for the newest event
        self._events: list[SaveEvent] = []
        if self._rank == 0:
            clean(checkpoints)

    def save(self, run_state: RunState, always: set[int] = frozenset(), delete: bool = True) -> None:
        """Save the state as it is now as that of `run_state.step`; collective. Waits for an earlier save first.
        always: steps whose checkpoints are never deleted. delete: whether older ones make way for this one."""
        started = time.perf_counter()
        self._join()
        boxes = owned(self._trunk, self._optimizer)
        boxes = boxes if self._host is None else self._host.take(boxes)
        job = _Job(run_state, boxes, common_state(self._optimizer), frozenset(always), delete, started)
        if self._host is None:
            self._run(job)
        else:
            self._thread = threading.Thread(target=self._run, args=(job,), name=f"save-{run_state.step}", daemon=True)
            self._thread.start()
        self._blocked = time.perf_counter() - started

    def save_boxes(self, run_state: RunState, boxes: Iterable[Box]) -> SaveEvent:
        """Write this rank's `boxes`, each made when it is asked for, as a checkpoint of weights alone; collective.
        No trunk has to be there, so an import of any size fits into little memory."""
        self._run(_Job(run_state, boxes, common_state(None), frozenset(), False, time.perf_counter()))
        return self._events.pop()

    def poll(self) -> list[SaveEvent]:
        """Saves finished since the last call; costs nothing. Ranks may see one at different steps."""
        if self._thread is not None and self._thread.is_alive():  # perhaps with its event there, but without its times
            return []
        return self.wait()

    def wait(self) -> list[SaveEvent]:
        """The same, once nothing is being written any more."""
        self._join()
        events, self._events = self._events, []
        return events

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._blocked is not None:
            self._events[-1] = replace(self._events[-1], seconds_blocked=self._blocked)
            self._blocked = None

    def _run(self, job: _Job) -> None:
        """Write `job` and add its event; never raises."""
        final = self._checkpoints / name_of(job.run_state.step)
        try:
            size, pruned, error = self._write(job, final)
        except Exception as failure:  # a rank died: its peers' messages fail
            size, pruned, error = 0, [], f"rank {self._rank}: {_reason(failure)}"
            if self._rank == 0 and not self._is_lost():
                clean(self._checkpoints)
        seconds = time.perf_counter() - job.started
        self._events.append(SaveEvent(job.run_state, final, 0.0, seconds, size, error, pruned))

    def _write(self, job: _Job, final: Path) -> tuple[int, list[str], str | None]:
        """Bytes of all files, names of the checkpoints deleted, and what went wrong: the same on all ranks."""
        temporary = final.parent / f".{final.name}.tmp"
        _, error = self._agree(self._attempt(lambda: _make(temporary)) if self._rank == 0 else None)
        if error:
            return 0, [], error
        files = self._gather(self._attempt(lambda: write_boxes(temporary, self._rank, job.boxes)))
        outcome = None
        if self._rank == 0:
            if errors := [error for _, error in files if error]:
                outcome = None, "; ".join(errors)
            else:
                outcome = self._attempt(lambda: self._finish(job, temporary, final, [file for file, _ in files]))
            if outcome[1] and not self._is_lost():
                shutil.rmtree(temporary, ignore_errors=True)
        result, error = self._agree(outcome)
        return *(result or (0, [])), error

    def _finish(self, job: _Job, temporary: Path, final: Path, files: list[Written]) -> tuple[int, list[str]]:
        """Rank 0, when all ranks' files are durable."""
        files = [*files, *write_index(temporary, files, job.common),
                 write_bytes(temporary / "run_state.json", json_bytes(job.run_state.as_dict()))]
        text = checksums_text({file.name: (file.bytes, file.sha256) for file in files}).encode()
        files.append(write_bytes(temporary / CHECKSUMS, text))
        publish(temporary, final, self._check)
        pruned = prune(self._checkpoints, self._keep, set(job.always), job.run_state.step) if job.delete else []
        return sum(file.bytes for file in files), pruned

    def _attempt(self, work: Callable) -> tuple:
        """(result, None), or (None, what went wrong on this rank)."""
        try:
            self._check()
            return work(), None
        except Exception as failure:
            return None, f"rank {self._rank}: {_reason(failure)}"

    def _is_lost(self) -> bool:
        """Whether another launch has taken the run directory."""
        return self._claim is not None and self._claim.lost() is not None

    def _check(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def _agree(self, outcome):
        """Rank 0's `outcome`, on every rank."""
        box = [outcome]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _gather(self, mine) -> list:
        """Everyone's `mine` on rank 0, in order of rank."""
        if self._group is None:
            return [mine]
        everyones = [None] * dist.get_world_size() if self._rank == 0 else None
        dist.gather_object(mine, everyones, dst=0, group=self._group)
        return everyones or []


def _make(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def _reason(failure: Exception) -> str:
    if isinstance(failure, OSError) and failure.strerror:
        return f"{failure.strerror}{f' ({failure.filename})' if failure.filename else ''}"
    text = next(iter(str(failure).splitlines()), "no message")
    return text if isinstance(failure, UserError) else f"{type(failure).__name__}: {text}"
