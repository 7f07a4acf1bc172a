"""What `evaluate` evaluates: tasks of mteb by name, whole benchmarks, and folders of one's own.

    1. `expand(names)`          names of tasks, benchmarks and folders -> a `TaskName` for each task
    2. `load(name, data)`       the task of mteb, its data loaded: from the hub, or from `data`, a folder of copies

A folder is a task by what lies in it: a BEIR folder is retrieval, files test.jsonl (or .csv, .tsv, .parquet, ...) with

    sentence1, sentence2, score     similarity (STS)             text, label, beside train.jsonl     classification
    sentence1, sentence2, labels    pair classification, 0 or 1

It has the folder's name, and mteb's metrics. `data` holds copies of the hub's data sets by their names there, such as
DATA/mteb/stsbenchmark-sts; code in them is never run.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.finetune.beir import is_beir, read_beir
from megatron_encdec.finetune.rows import READERS, read_file
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require

DEFAULT = "MTEB(eng, v2)"
TEST, TRAIN = "test", "train"
KINDS = {"STS": {"sentence1", "sentence2", "score"}, "PairClassification": {"sentence1", "sentence2", "labels"},
         "Classification": {"text", "label"}}
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
        folder = Path(name.folder)
        return fingerprint(sorted(one for one in folder.rglob("*") if one.is_file()), folder)
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
    number = {"STS": ("score", float), "PairClassification": ("labels", int)}.get(kind)
    try:
        return kind, DatasetDict({split: Dataset.from_list(
            [row | ({number[0]: number[1](row[number[0]])} if number else {}) for _, row in each])
            for split, each in rows.items()})
    except ValueError as error:
        raise UserError(f"{files[TEST][0]}: {number[0] if number else 'columns'}: {error}") from None


def fingerprint(files: list[Path], base: Path) -> str:
    """A hash of names (below `base`) and contents."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(base)} {content}\n".encode())
    return digest.hexdigest()[:40]
