"""The jobs of a study: a stretch, an export or a model's fine-tuning, each one command of ours in a process.

    1. `jobs_of(status)`      all that is to do now, each with the jobs that it waits for
    2. `Job.done`             asked of the disk, whoever did it
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from megatron_encdec.engine.checkpoint import read_run_state
from megatron_encdec.engine.integrity import name_of
from megatron_encdec.finetune.config import FinetuneConfig
from megatron_encdec.finetune.results_tree import TODO, state_of
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_atomic
from megatron_encdec.study.config import Resources
from megatron_encdec.study.plan import Point, StudyPlan
from megatron_encdec.study.store import Status, Store
from megatron_encdec.study.tree import Branch
from megatron_encdec.training.config import From


@dataclass(frozen=True)
class Job:
    """One process, or one for each rank, to be started by an executor.

    key: `kind/name`; its folder under `jobs` has config, log and lock. words: what follows `megatron-encdec`.
    needs: keys of jobs that come first. prepare: writes what it reads, called just before it starts. done: whether
    the disk has what it is for. position: how far it has come, of how much. run: the run directory of a stretch.
    """

    key: str
    folder: Path
    words: list[str]
    needs: list[str]
    prepare: Callable[[], None]
    done: Callable[[], bool]
    position: Callable[[], tuple[int, int]]
    resources: Resources = field(default_factory=Resources)
    run: Path | None = None

    @property
    def command(self) -> list[str]:
        """For one process; several ranks of a stretch are started by its launcher."""
        ranks = ["--nproc", str(self.resources.ranks)] if self.resources.ranks > 1 else []
        return [sys.executable, "-m", "megatron_encdec", *self.words, *ranks]


def jobs_of(status: Status) -> dict[str, Job]:
    """By key, those that others wait for first."""
    plan, store = status.plan, status.store
    jobs = [_stretch(plan, store, branch) for branch in plan.branches if branch in status.stretches]
    training, lost = {job.key for job in jobs}, set(status.lost)
    for point in plan.points:
        if point in lost:
            continue
        key, exporting = f"stretches/{point.branch.id}", point in status.exports
        if exporting:
            jobs.append(_export(store, point, [key] if key in training else []))
        if plan.study.finetune and not _is_scored(plan, store, point):
            jobs.append(_finetune(plan, store, point, [f"models/{point.name}"] if exporting else []))
    return {job.key: job for job in jobs}


def _stretch(plan: StudyPlan, store: Store, branch: Branch) -> Job:
    folder, run = store.folder("jobs/stretches", branch.id), store.run_of(branch)

    def prepare() -> None:
        write_atomic(folder / "config.yaml", _stretch_config(plan, store, branch, run))

    needs = [f"stretches/{branch.parent.id}"] if branch.parent else []
    return Job(f"stretches/{branch.id}", folder,
               ["pretrain", str(folder / "config.yaml"), "--until", str(branch.end)], needs, prepare,
               lambda: _is_state(run, branch), lambda: (_last_step(run, branch.start) - branch.start, branch.steps),
               plan.resources(branch), run)


def _stretch_config(plan: StudyPlan, store: Store, branch: Branch, run: Path) -> str:
    """The config of its first model; it goes on from its parent's last checkpoint, wherever that is, or without a
    parent begins as the base says."""
    config, parent = branch.recipe.config, branch.parent
    origin = config.run.from_
    if parent is not None:
        path, step = store.available.get(parent.hash_at(parent.end), (store.run_of(parent), parent.end))
        origin = From(str(path), step, "all" if branch.start else "weights")
    scored = [point.step for point in plan.points if point.branch is branch and point.step < branch.end]
    return yaml.safe_dump(schema.to_dict(replace(
        config, run=replace(config.run, dir=str(run), from_=origin),
        checkpoint=replace(config.checkpoint, steps=scored))), sort_keys=False)


def _is_state(run: Path, branch: Branch) -> bool:
    """Whether the run has the state that the branch ends with."""
    try:
        state = read_run_state(run / "checkpoints" / name_of(branch.end))
    except (OSError, UserError):
        return False
    return state.history_hash == branch.hash_at(branch.end)


def _last_step(run: Path, start: int) -> int:
    """Of the newest line in metrics.jsonl, read from its end."""
    _, found, rest = tail(run / "metrics.jsonl").rpartition('"step": ')
    try:
        return max(start, int(rest.split(",")[0])) if found else start
    except ValueError:  # a line that is being written
        return start


def tail(path: Path) -> str:
    """The last 4 KB of a file; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _export(store: Store, point: Point, needs: list[str]) -> Job:
    folder, out = store.folder("jobs/models", point.name), store.export_of(point)
    words = ["export", "", str(out), "--force"]

    def prepare() -> None:
        path, step = store.available.get(point.branch.hash_at(point.step), (store.run_of(point.branch), point.step))
        words[1] = f"{path}@{step}"

    return Job(f"models/{point.name}", folder, words, needs, prepare, lambda: store.has_export(point),
               lambda: (0, 0))


def finetune_config(plan: StudyPlan, store: Store, point: Point) -> FinetuneConfig:
    """Of one model: the study's grid, datasets and protocol."""
    return schema.build(FinetuneConfig, {
        **plan.study.finetune, "results": str(store.output / "results"),
        "models": [{"path": str(store.export_of(point)), "name": point.name, "series": point.models}]}, "finetune")


def _finetune(plan: StudyPlan, store: Store, point: Point, needs: list[str]) -> Job:
    folder = store.folder("jobs/results", point.name)

    def prepare() -> None:
        config = finetune_config(plan, store, point)
        write_atomic(folder / "config.yaml", yaml.safe_dump(schema.to_dict(config), sort_keys=False))

    def position() -> tuple[int, int]:
        return _scores(plan, store, point)

    return Job(f"results/{point.name}", folder, ["finetune", str(folder / "config.yaml")], needs, prepare,
               lambda: _is_scored(plan, store, point), position)


def _is_scored(plan: StudyPlan, store: Store, point: Point) -> bool:
    """Whether all its runs have ended, and are of this very state."""
    if point.name not in store.scored and store.has_results(point):
        ended, runs = _scores(plan, store, point)
        if ended == runs:
            store.scored.add(point.name)
    return point.name in store.scored


def _scores(plan: StudyPlan, store: Store, point: Point) -> tuple[int, int]:
    """Fine-tuning runs of the point that have ended, one way or the other, of how many."""
    runs = finetune_config(plan, store, point).runs()
    return sum(state_of(run.directory) != TODO for run in runs), len(runs)
