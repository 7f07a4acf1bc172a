"""What `evaluate` evaluates: tasks of mteb by name, whole benchmarks, and folders of one's own.

    1. `expand(names)`          names of tasks, benchmarks and folders -> a `TaskName` for each task
    2. `load(name, data)`       the task of mteb, its data loaded: from the hub, or from `data`, a folder of copies

A folder is a task by what lies in it: a BEIR folder is retrieval, files test.jsonl (or .csv, .tsv, .parquet, ...) with

    sentence1, sentence2, score     similarity (STS)             text, label, beside train.jsonl     classification
    sentence1, sentence2, labels    pair classification, 0 or 1

It has the folder's name, and mteb's metrics. `data` holds copies of the hub's data sets by their names there, such as
DATA/mteb/stsbenchmark-sts; code in them is never run.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_encdec.finetune.beir import is_beir, read_beir
from megatron_encdec.finetune.fingerprints import folder_fingerprint
from megatron_encdec.finetune.rows import READERS, read_file
from megatron_encdec.finetune.values import class_name, score_value
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require

DEFAULT = "MTEB(eng, v2)"
TEST, TRAIN = "test", "train"
KINDS = {"STS": {"sentence1", "sentence2", "score"}, "PairClassification": {"sentence1", "sentence2", "labels"},
         "Classification": {"text", "label"}}
TARGETS = {"STS": "score", "PairClassification": "labels", "Classification": "label"}
MAIN_SCORES = {"Retrieval": "ndcg_at_10", "STS": "cosine_spearman", "PairClassification": "max_ap",
               "Classification": "accuracy"}


@dataclass(frozen=True)
class TaskName:
    """A task: `name` in mteb (in `benchmark`, which may restrict languages and splits), or that of `folder`."""

    name: str
    benchmark: str | None = None
    folder: str | None = None


def expand(names: list[str]) -> list[TaskName]:
    """A `TaskName` for each task that `names` mean, each once."""
    mteb = require("mteb", "evaluate")
    found: dict[str, TaskName] = {}
    for name in names:
        if Path(name).is_dir():
            new = [TaskName(Path(name).resolve().name, folder=name)]
        elif name in {benchmark.name for benchmark in mteb.get_benchmarks()}:
            new = [TaskName(task.metadata.name, name) for task in mteb.get_benchmark(name).tasks]
        else:
            try:
                new = [TaskName(mteb.get_task(name).metadata.name)]
            except KeyError as error:
                raise UserError(f"--tasks {name}: no folder, and neither a task nor a benchmark of mteb "
                                f"{mteb.__version__} ({error.args[0]})") from None
        for task in new:
            if found.setdefault(task.name, task) != task:
                raise UserError(f"--tasks: two of them are called {task.name} ({found[task.name].folder or 'of mteb'}, "
                                f"{task.folder or 'of mteb'}); rename the folder, or leave one out")
    return list(found.values())


def load(name: TaskName, data: str | None):
    """The task, its data loaded. What cannot be had is a `UserError`: it says nothing of the model."""
    mteb = require("mteb", "evaluate")
    if name.folder:
        return _of_folder(Path(name.folder), name.name)
    tasks = mteb.get_benchmark(name.benchmark).tasks if name.benchmark else [mteb.get_task(name.name)]
    task = next(one for one in tasks if one.metadata.name == name.name)
    path, revision = task.metadata.dataset["path"], task.metadata.dataset.get("revision")
    if data is not None:
        copy = Path(data) / path
        if not copy.is_dir():
            raise UserError(f"{copy}: no such folder; --data holds copies of the hub's data sets by their names there")
        task.metadata = task.metadata.model_copy(update={"dataset": {**task.metadata.dataset, "path": str(copy)}})
    try:
        task.load_data()
    except Exception as error:  # noqa: BLE001  (the libraries raise many kinds; all mean that it cannot be had)
        raise UserError(f"{name.name}: its data set {path}{f' (revision {revision[:8]})' if revision else ''} cannot "
                        f"be loaded ({' '.join(str(error).split())[:200]}); without the hub, give --data FOLDER with a "
                        f"copy in FOLDER/{path}, or a folder of your own as a task") from None
    return task


def data_revision(name: TaskName) -> str | None:
    """What tells the data of a task from other data: a hash of a folder's files, the hub's revision of a set."""
    if name.folder:
        return folder_fingerprint(Path(name.folder))
    return require("mteb", "evaluate").get_task(name.name).metadata.dataset.get("revision")


def _of_folder(folder: Path, name: str):
    from mteb.abstasks import AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    if is_beir(folder):
        kind, dataset = "Retrieval", _retrieval(folder)
    else:
        kind, dataset = _rows(folder)
    base = {"Retrieval": AbsTaskRetrieval, "STS": AbsTaskSTS, "PairClassification": AbsTaskPairClassification,
            "Classification": AbsTaskClassification}[kind]
    metadata = TaskMetadata(
        name=name, description=f"{kind} on {folder}", type=kind, category="t2t", eval_splits=[TEST],
        eval_langs=["eng-Latn"], main_score=MAIN_SCORES[kind],
        dataset={"path": str(folder), "revision": data_revision(TaskName(name, folder=str(folder)))})
    task = type(f"Local{kind}", (base,), {"metadata": metadata})()
    task.dataset, task.data_loaded = dataset, True
    return task


def _retrieval(folder: Path) -> dict:
    from datasets import Dataset

    found = read_beir(folder, TEST)
    if not any(score > 0 for judged in found.judgements.values() for score in judged.values()):
        raise UserError(f"{folder}: no judgement of split {TEST} is above 0, so no query has an answer")
    corpus = [{"id": key, "title": title, "text": text} for key, (title, text) in found.corpus.items()]
    queries = [{"id": key, "text": text} for key, text in found.queries.items()]
    return {"default": {TEST: {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries),
                               "relevant_docs": found.judgements, "top_ranked": None}}}


def _rows(folder: Path) -> tuple[str, dict]:
    """The kind of task that the columns of test make, and its splits."""
    from datasets import Dataset, DatasetDict

    files = {split: [one for one in sorted(folder.glob(f"{split}.*")) if any(end in one.name for end in READERS)]
             for split in (TRAIN, TEST)}
    if len(files[TEST]) != 1 or len(files[TRAIN]) > 1:
        raise UserError(f"{folder}: no task: expected BEIR's corpus.jsonl, queries.jsonl and qrels/, or one file "
                        f"{TEST}.jsonl (.csv, .tsv, .parquet), and of {TRAIN} at most one")
    rows = {split: read_file(paths[0]) for split, paths in files.items() if paths}
    columns = set(rows[TEST][0][1])
    kind = next((kind for kind, needed in KINDS.items() if needed <= columns), None)
    if kind is None or (kind == "Classification" and TRAIN not in rows):
        raise UserError(f"{files[TEST][0]}: no task: its columns are {', '.join(sorted(columns))}; expected "
                        + "; ".join(f"{', '.join(sorted(needed))} ({one})" for one, needed in KINDS.items())
                        + f", classification with {TRAIN} beside it")
    for where, row in (one for split in rows.values() for one in split):
        if missing := [key for key in KINDS[kind] if row.get(key) is None]:
            raise UserError(f"{where}: no {missing[0]}; columns there: {', '.join(map(str, row))}")
    checked = {split: [_checked(kind, *row) for row in each] for split, each in rows.items()}
    target, judged = TARGETS[kind], TRAIN if kind == "Classification" else TEST
    if len({row[target] for row in checked[judged]}) < 2:
        raise UserError(f"{files[judged][0]}: {target}: all are {checked[judged][0][target]!r}, so there is nothing to "
                        "tell apart")
    if kind == "Classification":
        _number_classes([row for each in checked.values() for row in each])
    return kind, DatasetDict({split: Dataset.from_list(each) for split, each in checked.items()})


def _number_classes(rows: list[dict[str, Any]]) -> None:
    """Classes as mteb wants them: whole numbers that stand there, else their places in order."""
    names = sorted({row["label"] for row in rows})
    numbered = all(re.fullmatch(r"-?\d+", name) for name in names)
    for row in rows:
        row["label"] = int(row["label"]) if numbered else names.index(row["label"])


def _checked(kind: str, where: str, row: dict[str, Any]) -> dict[str, Any]:
    """The columns of the task: texts, and the target as mteb wants it (score: a number, labels: 0 or 1, label: a class
    as `finetune` reads it)."""
    target, found = TARGETS[kind], {}
    for key in sorted(KINDS[kind]):
        value = found[key] = row[key]
        if key != target and not isinstance(value, str):
            raise UserError(f"{where}: {key}: expected a text, found {value!r}")
    try:
        found[target] = class_name(row[target]) if kind == "Classification" else score_value(row[target])
    except ValueError as error:
        raise UserError(f"{where}: {target}: {error}") from None
    if kind == "PairClassification":
        if found[target] not in (0, 1):
            raise UserError(f"{where}: labels: expected 0 or 1, found {row[target]!r}")
        found[target] = int(found[target])
    return found
