"""A model as it is, not trained further, on one task of mteb: its embeddings, mteb's scores.

    1. `FrozenRun`                    a model and a task; its folder is RESULTS/<model>/MTEB/<task>/frozen
    2. `evaluate_one(run, report)`    in a sweep's worker: results.json for reports, and mteb's own file in
                                      RESULTS/_mteb/results/<model>/<revision>/<task>.json, as mteb's ResultCache has it

The model is loaded by sentence-transformers, which embeds texts of like length together. Its revision is a hash of its
files, so that scores of other weights are never taken for its own. While a task is under way, what mteb has done of it
lies in the run's folder; an evaluation that was killed goes on from there.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.finetune import mteb_tasks
from megatron_encdec.finetune.embedders import load_embedder
from megatron_encdec.finetune.mteb_tasks import TaskName
from megatron_encdec.finetune.results_tree import FROZEN, RESULTS, ZERO_SHOT, read_json
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require
from megatron_encdec.rundir.files import flush_to_disk, replace_durably

MTEB, UNFINISHED = "_mteb", "mteb"  # of the tree, which reports pass over; of a run under way


@dataclass(frozen=True)
class FrozenRun:
    """`model`: a directory of transformers or sentence-transformers, of which `revision` is a hash."""

    model: str
    name: str
    revision: str
    task: TaskName
    results: str
    data: str | None = None
    batch_size: int = 32

    @property
    def directory(self) -> Path:
        """The run's folder in the results tree."""
        return Path(self.results) / self.name / ZERO_SHOT / self.task.name / FROZEN

    def check(self) -> None:
        """`UserError` where the results in its folder are of another model, or of other data."""
        if (path := self.directory / RESULTS).is_file():
            made = read_json(path).get("mteb", {})
            found, data, now = made.get("revision"), made.get("dataset_revision"), mteb_tasks.data_revision(self.task)
            if found != self.revision:
                raise UserError(f"{path}: the results there are of other weights (revision {str(found)[:8]}, "
                                f"{self.model} is {self.revision[:8]}); give it another name (NAME={self.model}), or "
                                "--results another folder")
            if data != now:
                raise UserError(f"{path}: the results there are of other data (revision {str(data)[:8]}, "
                                f"{self.task.folder or self.task.name} is {str(now)[:8]}); give --results another "
                                "folder, or delete that one")


def evaluate_one(run: FrozenRun, report=None) -> dict:
    """{"validation": {"score"}, "test": {"score"}, "mteb": {...}}: the main score, twice, for nothing is chosen."""
    mteb = require("mteb", "evaluate")
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.results import TaskResult

    task, cache = mteb_tasks.load(run.task, run.data), _cache(run)
    model = SentenceTransformerEncoderWrapper(load_embedder(run.model, run.revision))
    model.mteb_model_meta = model.mteb_model_meta.model_copy(
        update={"name": f"local/{run.name}", "revision": run.revision})
    _forget_torn(cache, task, model.mteb_model_meta)
    done = mteb.evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False,
                         encode_kwargs={"batch_size": run.batch_size, "show_progress_bar": False})
    task.unload_data()
    (result,) = done.task_results  # exact, or rounded where it was finished before a kill
    if report is not None:
        report(1, 1)  # another sweep may have taken the run over meanwhile
    path = _publish(run, cache.get_task_result_path(result.task_name, model.mteb_model_meta))
    score = {"score": float(TaskResult.from_disk(path).get_score())}  # six digits
    return {"validation": score, "test": score, "mteb": {
        "main_score": task.metadata.main_score, "type": task.metadata.type, "version": mteb.__version__,
        "revision": run.revision, "dataset_revision": result.dataset_revision, "file": str(path)}}


def _cache(run: FrozenRun):
    from mteb import ResultCache

    return ResultCache(run.directory / UNFINISHED)


def _forget_torn(cache, task, meta) -> None:
    """What a kill left half-written, or what is of other data, is done again."""
    from mteb.results import TaskResult

    path = cache.get_task_result_path(task.metadata.name, meta)
    if path.is_file():
        try:
            same = TaskResult.from_disk(path).dataset_revision == task.metadata.dataset.get("revision")
        except Exception:  # noqa: BLE001  (JSON's errors and pydantic's alike)
            same = False
        if not same:
            shutil.rmtree(cache.cache_path)


def _publish(run: FrozenRun, path: Path) -> Path:
    """mteb's file, and what it says of the model, at their places in the tree."""
    folder = Path(run.results) / MTEB / path.relative_to(run.directory / UNFINISHED).parent
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model_meta.json", path.name):
        with open(path.parent / name, "rb+") as file:
            flush_to_disk(file)
        replace_durably(path.parent / name, folder / name)
    shutil.rmtree(run.directory / UNFINISHED)
    return folder / path.name
