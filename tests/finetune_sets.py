"""A tiny encoder with its tokenizer, and labelled sets whose rule it can learn in seconds."""

import json
import random
from pathlib import Path

SPLITS = ("train", "validation", "test")
WORDS = ["alpha", "beta", "gamma", "delta", "river", "stone", "cloud", "light", "table", "green", "seven", "paper"]
NAMES = ["Paris", "Oslo", "Lima", "Cairo"]


def sentence(draw: random.Random, length: int = 6) -> list[str]:
    """Words without a meaning."""
    return [draw.choice(WORDS) for _ in range(length)]


def row(family: str, draw: random.Random) -> dict:
    """One row of the family's local format."""
    words = sentence(draw)
    if family == "SC":
        label = draw.choice(["good", "bad"])
        words.insert(draw.randrange(6), label)
        return {"text": " ".join(words), "label": "yes" if label == "good" else "no"}
    if family == "TC":
        words.insert(draw.randrange(6), draw.choice(NAMES))
        return {"tokens": words, "tags": ["B-CITY" if word in NAMES else "O" for word in words]}
    if family == "QA":
        name = draw.choice(NAMES)
        place = draw.randrange(6)
        answered = draw.random() < 0.7
        words[place] = name if answered else words[place]
        context = " ".join(words)
        answers = {"text": [name], "answer_start": [context.index(name)]} if answered else \
            {"text": [], "answer_start": []}
        return {"question": "which city?", "context": context, "answers": answers}
    return {"query": " ".join(words[:3]), "positive": " ".join(words)}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """`rows` as JSON lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def write_set(folder: Path, family: str, sizes=(96, 16, 24)) -> dict:
    """train, validation and test.jsonl of `family`; the keys of a dataset in a config."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(family)
    files = {split: str(write_rows(folder / f"{split}.jsonl", [row(family, draw) for _ in range(size)]))
             for split, size in zip(SPLITS, sizes, strict=True)}
    return {"name": "toy", "family": family, **files}


def write_model(folder: Path, kind: str = "eurobert", positions: int = 64) -> Path:
    """A two-layer encoder with random weights (`llama`: the same weights, exported as a causal model)."""
    import torch
    from transformers import EuroBertConfig, EuroBertForMaskedLM, LlamaConfig, LlamaForCausalLM

    from megatron_encdec.text.tokenizer import train_tokenizer

    draw = random.Random(0)
    texts = [" ".join([*sentence(draw), *NAMES, "good", "bad", "which city? Query: Document:"]) for _ in range(200)]
    train_tokenizer(texts, 400, folder)
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2, max_position_embeddings=positions, rms_norm_eps=1e-5, pad_token_id=2,
                 bos_token_id=None, eos_token_id=0, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = EuroBertForMaskedLM(EuroBertConfig(**sizes, mask_token_id=1))
    if kind == "llama":
        weights, model = model.state_dict(), LlamaForCausalLM(LlamaConfig(**sizes))
        model.load_state_dict(weights)
    model.save_pretrained(folder)
    return folder


def run_of(root: Path, family: str, results: str = "results", model: str = "euro", steps: int = 30,
           shared: bool = False, settings: dict | None = None, **training):
    """A run of `root`/`model`, with the keys `settings`, on a set of `family`. `shared` (retrieval): each query has a
    second positive, which all have."""
    from megatron_encdec.finetune.config import DatasetConfig, FinetuneRun, ModelSource, TrainingConfig

    folder = root / (family + "_shared" * shared)
    files = {"name": "toy", "family": family, **{split: str(folder / f"{split}.jsonl") for split in SPLITS}}
    if not folder.exists():
        write_set(folder, family)
        if shared:
            rows = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()]
            write_rows(Path(files["train"]), [{**row, "positive": [row["positive"], "river stone"]} for row in rows])
    protocol = dict(batch_size=16, micro_batch_size=8, max_steps=steps, epochs=100, max_length=48)
    return FinetuneRun(ModelSource(str(root / model), **(settings or {})), DatasetConfig(**files), 3e-3, 0,
                       str(root / results), TrainingConfig(**{**protocol, **training}))


def run_one(*arguments):
    """Imported when a test runs: where NeMo is missing, the tests are collected and skipped."""
    from megatron_encdec.finetune.run import run_one

    return run_one(*arguments)


def record_of(run) -> dict:
    """Its record.json."""
    return json.loads((run.directory / "record.json").read_text())


def losses(run) -> dict:
    """{step: loss} of its training.jsonl."""
    lines = (run.directory / "checkpoints/training.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}
