"""Runs per hour of a sweep, beside one process per run of a plain Hugging Face Trainer: same model, data and grid.

    python benchmarks/finetune.py [--model HF_DIR] [--rounds 2] [--rates 5e-5,2e-4] [--seeds 2] [--steps 30]
                                  [--examples 800] [--length 64] [--workers N] [--json PATH]
                                  [--trainer-python .venv/bin/python]

Without --model a small EuroBERT with random weights and a byte-level BPE are made from torch's docstrings; the task is
which of its eight largest sub-packages a docstring is from. Both sides train every (learning rate,
seed) for the same number of steps of 32 examples, score validation and test, and write the scores down. They take turns
in one session, on the same cores:

    sweep      `megatron-encdec finetune CONFIG`, all of it: starting, runs, ending
    trainer    a process for each run, one after the other on all cores: AutoModelForSequenceClassification, Trainer
               with its defaults but the grid's; the tokenised data are kept on disk between its processes

Prints both in runs per hour, their ratio round by round, and the mean test score of each as a sign that they do the
same work. Needs megatron_encdec[nemo]. The Trainer needs accelerate, and starts quicker in an environment without
NeMo's packages: --trainer-python names one's interpreter.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIBRARIES, VOCABULARY, BATCH = 8, 8192, 32


def make_data(folder: Path, examples: int) -> None:
    """`train`, `validation` and `test`.jsonl of {text, label}: docstrings of the sub-packages that have most."""
    import torch

    tool = Path(__file__).parents[1] / "tools" / "build_docstring_corpus.py"
    subprocess.run([sys.executable, tool, folder / "docs.jsonl", "--site-packages", Path(torch.__file__).parent],
                   check=True)
    by_library = collections.defaultdict(list)
    for line in (folder / "docs.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        by_library[record["library"]].append(record["text"])
    libraries = sorted(by_library, key=lambda name: -len(by_library[name]))[:LIBRARIES]
    each = examples // LIBRARIES
    for split, start, count in (("train", 0, each), ("validation", each, each // 4), ("test", 2 * each, each // 4)):
        rows = [{"text": text, "label": name} for name in libraries for text in by_library[name][start : start + count]]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_model(folder: Path, length: int) -> Path:
    """A EuroBERT of 4 layers with random weights, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, EuroBertConfig, EuroBertForMaskedLM

    from megatron_encdec.text.tokenizer import train_tokenizer

    lines = (folder / "docs.jsonl").read_text(encoding="utf-8").splitlines()[:4000]
    train_tokenizer((json.loads(line)["text"] for line in lines), VOCABULARY, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    torch.manual_seed(0)
    config = EuroBertConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=max(512, length),
                            pad_token_id=pad, bos_token_id=pad, eos_token_id=pad, mask_token_id=pad,
                            classifier_pooling="mean")
    EuroBertForMaskedLM(config).save_pretrained(folder / "model")
    return folder / "model"


def trainer_run(arguments) -> None:
    """One run of the plain Trainer, in this process."""
    import numpy as np
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    splits = load_dataset("json", data_files={split: str(arguments.data / f"{split}.jsonl")
                                              for split in ("train", "validation", "test")},
                          cache_dir=str(arguments.data / "cache"))
    names = sorted(set(splits["train"]["label"]))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    splits = splits.map(lambda rows: {**tokenizer(rows["text"], truncation=True, max_length=arguments.length),
                                      "label": [names.index(label) for label in rows["label"]]},
                        batched=True, remove_columns=["text"])
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(names))
    settings = TrainingArguments(
        output_dir=str(arguments.out), learning_rate=arguments.rates[0], seed=arguments.seeds,
        max_steps=arguments.steps,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, warmup_steps=arguments.steps // 10,
        lr_scheduler_type="linear", weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-5, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True)
    trainer = Trainer(model, settings, train_dataset=splits["train"], processing_class=tokenizer,
                      data_collator=DataCollatorWithPadding(tokenizer),
                      compute_metrics=lambda found: {"score": float(np.mean(
                          found.predictions.argmax(-1) == found.label_ids))})
    trainer.train()
    scores = {split: {"score": trainer.evaluate(splits[split])["eval_score"]} for split in ("validation", "test")}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(scores))


def trainer_round(arguments, work: Path, round_: int) -> tuple[float, list[float]]:
    """Seconds of the whole grid, a process a run, and the test scores."""
    began, scores = time.perf_counter(), []
    for rate in arguments.rates:
        for seed in range(arguments.seeds):
            out = work / f"trainer_{round_}" / f"lr{rate:g}_sd{seed}"
            run_process([__file__, "--one-run", "--model", arguments.model, "--data", work, "--out", out,
                         "--rates", rate, "--seeds", seed, "--steps", arguments.steps, "--length", arguments.length],
                        arguments.trainer_python)
            scores.append(json.loads((out / "results.json").read_text())["test"]["score"])
    return time.perf_counter() - began, scores


def sweep_round(arguments, work: Path, round_: int) -> tuple[float, list[float]]:
    """Seconds of `megatron-encdec finetune` on the same grid, and the test scores."""
    results = work / f"sweep_{round_}"
    config = {"model": str(arguments.model), "results": str(results),
              "datasets": [{"name": "library", "family": "SC",
                            **{split: str(work / f"{split}.jsonl") for split in ("train", "validation", "test")}}],
              "grid": {"learning_rates": arguments.rates, "seeds": list(range(arguments.seeds))},
              "training": {"batch_size": BATCH, "micro_batch_size": BATCH, "max_steps": arguments.steps,
                           "epochs": 1000, "max_length": arguments.length}}
    (work / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    workers = ["--workers", arguments.workers] if arguments.workers else []
    began = time.perf_counter()
    run_process(["-m", "megatron_encdec", "finetune", work / "config.yaml", *workers])
    seconds = time.perf_counter() - began
    return seconds, [json.loads(path.read_text())["test"]["score"] for path in sorted(results.rglob("results.json"))]


def run_process(words: list, python: str = sys.executable) -> None:
    """`PYTHON WORDS`; ends this benchmark with what it said if it fails."""
    paths = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([python, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def compare(arguments, work: Path) -> dict:
    """All rounds; the side that begins changes each time."""
    make_data(work, arguments.examples)
    arguments.model = arguments.model or make_model(work, arguments.length)
    runs, rounds = len(arguments.rates) * arguments.seeds, []
    for round_ in range(arguments.rounds):
        found = {}
        sides = [("sweep", sweep_round), ("trainer", trainer_round)]
        for name, one in sides if round_ % 2 == 0 else sides[::-1]:
            seconds, scores = one(arguments, work, round_)
            found[name] = {"runs_per_hour": 3600 * runs / seconds, "seconds": seconds, "test": statistics.mean(scores)}
            print(f"round {round_ + 1}  {name:8} {runs} runs in {seconds:6.1f} s: {3600 * runs / seconds:7.1f} runs an "
                  f"hour, mean test score {found[name]['test']:.4f}", flush=True)
        found["ratio"] = found["sweep"]["runs_per_hour"] / found["trainer"]["runs_per_hour"]
        rounds.append(found)
    ratios = [found["ratio"] for found in rounds]
    print(f"sweep / trainer, runs per hour: {statistics.median(ratios):.2f}  ({', '.join(f'{r:.2f}' for r in ratios)})")
    return {"rounds": rounds, "ratio": statistics.median(ratios), "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")], default=[5e-5, 2e-4])
    parser.add_argument("--seeds", type=int, default=2, help="how many; of --one-run: which")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--examples", type=int, default=800)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trainer-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--one-run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_run:
        trainer_run(arguments)
        return
    with tempfile.TemporaryDirectory() as work:
        found = compare(arguments, Path(work))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
