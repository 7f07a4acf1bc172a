"""The files of one run: its cell, NeMo's YAML, the record of what happened, and the model where it is kept.

    <run>/cell.json       the cell, all settings; NeMo's YAML points to it
    <run>/nemo.yaml       what `nemo_automodel.cli.app` takes to repeat the run, on one rank or more
    <run>/record.json     versions, metric, sizes, seconds
    <run>/model/          a stock Hugging Face directory (`training.save_model`)
    <run>/results.json    {"validation": {"score", "scores_i"}, "test": ...}; written last: the run is finished

    1. `write_cell`, `read_cell`     the cell
    2. `finish`                      model, record, then results
    3. `versions`                    of the packages that decide a score
"""

import importlib.metadata
import json
import shutil
from pathlib import Path

from megatron_encdec import __version__
from megatron_encdec.finetune.config import Cell
from megatron_encdec.interop.hugging_face import write_pooling
from megatron_encdec.platform.schema import build, to_dict
from megatron_encdec.rundir.files import write_json_atomic

CELL, RECORD, RESULTS, MODEL = "cell.json", "record.json", "results.json", "model"
PACKAGES = ("torch", "transformers", "tokenizers", "nemo-automodel", "seqeval", "numpy")


def write_cell(cell: Cell) -> Path:
    """Write `cell` into its folder; the file's path."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(cell.directory / CELL, to_dict(cell))
    return cell.directory / CELL


def read_cell(path: str | Path) -> Cell:
    """The cell in the file at `path`."""
    return build(Cell, json.loads(Path(path).read_text(encoding="utf-8")), str(path))


def finish(cell: Cell, results: dict, model, task, facts: dict) -> None:
    """The model, if it is to be kept; the record, with `facts` about the run; results.json last."""
    if cell.training.save_model:
        _save_model(cell, model, task)
    write_json_atomic(cell.directory / RECORD, {
        "metric": task.metric, **facts, "train_features": len(task.train), "max_length": task.max_length,
        **task.counts, "labels": list(task.labels), "versions": versions()})
    write_json_atomic(cell.directory / RESULTS, results)


def _save_model(cell: Cell, model, task) -> None:
    """A stock directory under <run>/model; a retriever's is one for sentence-transformers too."""
    target = cell.directory / MODEL
    unfinished = cell.directory / f".{MODEL}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    task.tokenizer.save_pretrained(unfinished)
    if cell.family == "IR":
        write_pooling(unfinished, model.config.hidden_size, task.max_length)
        write_json_atomic(unfinished / "config_sentence_transformers.json", {
            "prompts": {"query": cell.training.query_prefix, "document": cell.training.document_prefix},
            "default_prompt_name": None, "similarity_fn_name": "cosine"})
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def versions() -> dict[str, str]:
    """Of ours and of the packages that decide a score; those not installed are left out."""
    found = {"megatron-encdec": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
