"""What a study has on disk, found by what determined it: no file of the driver's says what is done.

    OUTPUT/stretches/<id>/          run directories, one a stretch; .../pruned/step_N.json of checkpoints that went
    OUTPUT/models/<name>/           exports
    OUTPUT/results/<name>/...       fine-tuning (finetune/results_tree.py)
    OUTPUT/report/                  the report
    OUTPUT/jobs/<kind>/<id>/        config, log and lock of each job (local.py, slurm.py)

    1. `Store(output).look()`       checkpoints by history hash
    2. `Status(plan, store)`        which stretches and exports are still to do
    3. `prune(status)`              deletes checkpoints that nothing needs any more
"""

import contextlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_encdec.engine.checkpoint import read_run_state, remove
from megatron_encdec.engine.integrity import name_of, saved_names, step_of
from megatron_encdec.finetune.results_tree import EXPORT, MODEL
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.study.plan import Point, StudyPlan
from megatron_encdec.study.tree import Branch


@dataclass
class Store:
    """exports: names of those there. available: history hash -> run directory and step of a checkpoint with that state.
    pruned: hash -> the record of one that was deleted. scored: names whose fine-tuning is known to have ended."""

    output: Path
    exports: set[str] = field(default_factory=set)
    available: dict[str, tuple[Path, int]] = field(default_factory=dict)
    pruned: dict[str, Path] = field(default_factory=dict)
    scored: set[str] = field(default_factory=set)
    _read: dict[Path, tuple[int, str]] = field(default_factory=dict)  # run_state.json -> its time, the hash in it

    def look(self) -> None:
        """Find what there is now."""
        self.available, self.pruned = {}, {}
        self.exports = {path.name for path in (self.output / "models").glob("*")}
        for run in sorted((self.output / "stretches").glob("*")):
            for record in (run / "pruned").glob("step_*.json"):
                with contextlib.suppress(OSError, ValueError, KeyError):  # written whole, or somebody's own
                    self.pruned[json.loads(record.read_text(encoding="utf-8"))["history_hash"]] = record
            for name in saved_names(run / "checkpoints"):
                if (found := self._hash_of(run / "checkpoints" / name)) is not None:
                    self.available.setdefault(found, (run, step_of(name)))

    def _hash_of(self, checkpoint: Path) -> str | None:
        path = checkpoint / "run_state.json"
        try:
            time = os.stat(path).st_mtime_ns
            if self._read.get(path, (0, ""))[0] != time:
                self._read[path] = time, read_run_state(checkpoint).history_hash
        except (OSError, UserError):  # being written, deleted or damaged: whoever loads it says so
            return None
        return self._read[path][1]

    def folder(self, kind: str, name: str) -> Path:
        """`stretches`, `models`, `results`, `jobs/...` of one thing."""
        return self.output / kind / name

    def run_of(self, branch: Branch) -> Path:
        """Where it is trained: its own folder, or one more where its checkpoints were pruned and it is needed again."""
        run, again = self.folder("stretches", branch.id), 1
        while (run / "pruned" / f"{name_of(branch.end)}.json").exists():
            again += 1
            run = self.folder("stretches", f"{branch.id}.{again}")
        return run

    def export_of(self, point: Point) -> Path:
        """The Hugging Face model of a point."""
        return self.folder("models", point.name)

    def has_export(self, point: Point) -> bool:
        """Whether the export of this very state is there, with all its files."""
        out = self.export_of(point)
        record = _record(out / EXPORT)
        return _is_of(point, record) and all(_has_bytes(out / name) for name in record.get("files") or ())

    def has_results(self, point: Point) -> bool:
        """Whether the results under its name, if there are any, are of this very state."""
        return _is_of(point, _record(self.output / "results" / point.name / MODEL))


class Status:
    """What is to do, as the disk says. A stretch is to do where the state it ends with is wanted and not there."""

    def __init__(self, plan: StudyPlan, store: Store):
        store.look()
        self.plan, self.store = plan, store
        self.exports = {point: None for point in plan.points  # in their order
                        if point.name not in store.exports or not store.has_export(point)}
        unexported = {(point.branch, point.step) for point in self.exports}
        self.stretches: set[Branch] = set()
        for branch in reversed(plan.branches):
            state = branch.hash_at(branch.end)
            wanted = (any(child in self.stretches for child in branch.children) or (branch, branch.end) in unexported
                      or (branch.ending and state not in store.pruned))
            if wanted and state not in store.available:
                self.stretches.add(branch)

    @cached_property
    def lost(self) -> list[Point]:
        """Points that can no longer be exported: the stretch was trained before they were asked for."""
        return [point for point in self.exports if point.branch not in self.stretches
                and point.branch.hash_at(point.step) not in self.store.available]

    @property
    def notes(self) -> list[str]:
        """What a person should know besides the states: which points are lost."""
        names = [point.name for point in self.lost]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return [f"not scored: {shown}: there is no checkpoint, since the stretch was trained before they were asked "
                "for; delete its folder to train it again"] if names else []

    def states(self, running: Collection[str] = ()) -> dict[str, str]:
        """`done`, `running` or `to do` of each stretch, by its id."""
        return {branch.id: "done" if branch not in self.stretches else "running" if branch.id in running else "to do"
                for branch in self.plan.branches}

    @cached_property
    def needed(self) -> set[str]:
        """Hashes of the states that something to do begins from, or that are what a model ends with."""
        begins = {branch.parent.hash_at(branch.parent.end) for branch in self.stretches if branch.parent}
        exports = {point.branch.hash_at(point.step) for point in self.exports}
        return begins | exports | {branch.hash_at(branch.end) for branch in self.plan.branches if branch.ending}


def _record(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_of(point: Point, record: dict) -> bool:
    return "history_hash" in record and record["history_hash"] == point.branch.hash_at(point.step)  # made if needed


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def prune(status: Status, running: set[str]) -> list[str]:
    """Delete the checkpoints of finished stretches that nothing to do needs; what they were stays in `pruned/`.
    Returns `STRETCH@STEP` of each."""
    finished = {run for branch in status.plan.branches if branch not in status.stretches and branch.id not in running
                for run in (status.store.folder("stretches", branch.id), status.store.run_of(branch))}
    gone = []
    for state, (run, step) in status.store.available.items():
        if run in finished and state not in status.needed:
            found = read_run_state(run / "checkpoints" / name_of(step))
            (run / "pruned").mkdir(exist_ok=True)
            write_json_atomic(run / "pruned" / f"{name_of(step)}.json", found.as_dict())
            remove(run / "checkpoints", name_of(step))
            gone.append(f"{run.name}@{step}")
    return gone
