"""What a fine-tuned model's directory says of itself: finetune.json for programs, README.md for readers and hubs.

Both name the model it began from, the set, the seed and the rate, the scores, and, where that model was exported here,
the pretraining run it came from (its export.json).
"""

from pathlib import Path
from typing import Any

from megatron_encdec import __version__
from megatron_encdec.finetune.config import FinetuneRun
from megatron_encdec.finetune.results_tree import EXPORT, read_json
from megatron_encdec.rundir.files import write_atomic, write_json_atomic

SETTINGS = "finetune.json"
_TASKS = {"SC": "text-classification", "TC": "token-classification", "QA": "question-answering",
          "IR": "sentence-similarity"}


def write_card(directory: Path, run: FinetuneRun, metric: str, max_length: int, results: dict[str, dict]) -> None:
    """Write both files into `directory`, which holds the model."""
    stock = not (directory / "modules.json").is_file()
    exported = Path(run.model.path) / EXPORT
    origin = read_json(exported) if exported.is_file() else {}
    record = {
        "base_model": run.model.path, "weights": run.model.weights, "family": run.family, "dataset": run.dataset.name,
        "learning_rate": run.lr, "seed": run.seed, "metric": metric, "max_length": max_length,
        "attention": run.model.attention, "pooling": run.model.pooling if run.family in ("SC", "IR") else None,
        "scores": {split: part["score"] for split, part in results.items()},
        "pretraining": {key: origin[key] for key in ("step", "history_hash", "run") if key in origin} or None}
    write_json_atomic(directory / SETTINGS, record)
    write_atomic(directory / "README.md", _front_matter(run, stock) + _text(run, record, stock))


def _front_matter(run: FinetuneRun, stock: bool) -> str:
    library = "transformers" if stock else "sentence-transformers"
    return (f"---\nlibrary_name: {library}\npipeline_tag: {_TASKS[run.family]}\ntags: [megatron-encdec]\n---\n\n")


def _text(run: FinetuneRun, record: dict[str, Any], stock: bool) -> str:
    name, begun = Path(run.model.path).name, "" if run.model.weights == "pretrained" else ", with random weights"
    rows = [("dataset", f"{run.dataset.name} ({run.family})"), ("learning rate", f"{run.lr:g}"), ("seed", run.seed),
            ("metric", record["metric"]), *((f"{split} score", f"{100 * score:.2f}")
                                           for split, score in record["scores"].items()),
            ("longest text", f"{record['max_length']} tokens"), ("attention", record["attention"])]
    if record["pooling"]:
        rows.append(("pooling", record["pooling"]))
    if run.family == "IR":
        rows += [(f"prompt of a {kind}", f"`{prompt}`") for kind, prompt in zip(("query", "document"), run.prefixes,
                                                                                 strict=True)]
    if origin := record["pretraining"]:
        rows += [("pretrained for", f"{origin['step']} steps"), ("its history", f"`{origin['history_hash']}`")]
    auto = {"SC": "AutoModelForSequenceClassification"}.get(run.family, "AutoModelForTokenClassification")
    use = (f"from transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained(path)\n" if stock else
           "from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer(path)\n"
           + ("" if run.family == "IR" else "logits = model.encode(texts"
              + (")\n" if run.family == "SC" else ', output_value="token_embeddings")\n')))
    table = "".join(f"| {key} | {value} |\n" for key, value in rows)
    return (f"# {name} on {run.dataset.name}\n\n`{name}`{begun}, fine-tuned by megatron_encdec {__version__}.\n\n"
            f"| | |\n|---|---|\n{table}\n```python\n{use}```\n")
