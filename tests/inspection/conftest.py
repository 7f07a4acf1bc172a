"""What there is to inspect: real token files, a real tiny run, and runs with metrics written by hand."""

import json
from pathlib import Path

import pytest
from corpora import write_tokens

from megatron_encdec.cli import main

TEXTS = [f"the small cat {verb} the old house and {verb} a warm stone while it rains" * repeats
         for repeats in (1, 2, 5) for verb in ("sees", "likes", "paints", "leaves", "finds", "hides")]
CONFIG = """
run: {{dir: {run}, seed: 3}}
tokenizer: {{path: {tokenizer}}}
data: {{train: [{{path: {data}}}], validation: [{{path: {data}.validation}}], sequence_length: 32}}
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, num_query_groups: 2,
         vocabulary_size: {vocabulary}}}
phases:
  - {{name: causal, objective: clm, steps: 4}}
  - {{name: masked, objective: {{name: mlm, mask_ratio: 0.3}}, steps: 4}}
batch: {{global_size: 4, micro_size: 2}}
precision: {{dtype: fp32}}
checkpoint: {{every: 6, keep: 2}}
evaluation: {{every: 100, batches: 1}}
logging: {{tensorboard: false}}
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """`tokenizer/`, `corpus.*` and `corpus.validation.*`, made by `preprocess`; one document is skipped."""
    directory = tmp_path_factory.mktemp("inspection")
    with open(directory / "text.jsonl", "w") as file:
        for i, text in enumerate(TEXTS * 6):
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
        file.write(json.dumps({"text": ""}) + "\n")
    options = {"input": directory / "text.jsonl", "output": directory / "corpus", "validation-percent": 15,
               "tokenizer": directory / "tokenizer", "train-tokenizer": 320, "workers": 1}
    assert main(["preprocess", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return directory


@pytest.fixture(scope="session")
def real_run(workspace) -> Path:
    """A run of two phases of four steps, with checkpoints at steps 4, 6 and 8."""
    manifest = json.loads((workspace / "corpus.manifest.json").read_text())
    vocabulary = manifest["tokenizer"]["vocabulary_size"]
    config = workspace / "config.yaml"
    config.write_text(CONFIG.format(run=workspace / "run", tokenizer=workspace / "tokenizer",
                                    data=workspace / "corpus", vocabulary=vocabulary))
    assert main(["pretrain", str(config)]) == 0
    return workspace / "run"


@pytest.fixture
def write_pair():
    """write_pair(prefix, documents, dtype="uint16") -> prefix of a .bin/.idx pair without a manifest."""
    def write(prefix, documents, dtype="uint16"):
        write_tokens(prefix, documents, dtype)
        return prefix
    return write


def train_line(step: int, phase: str, objective: str, loss: float | None, targets: int, speed: float) -> dict:
    """A train line as the loop writes it; a step is 4 windows of 32 tokens."""
    return {"kind": "train", "step": step, "phase": phase, "objective": objective, "loss": loss, "lr": 1e-3,
            "grad_norm": 1.0, "tokens": step * 128, "samples": step * 4, "targets": targets,
            "tokens_per_second": speed, "mfu": 0.1}


def eval_line(step: int, phase: str, **losses: float) -> dict:
    """An eval line as the loop writes it."""
    return {"kind": "eval", "step": step, "phase": phase, "losses": losses, "tokens": step * 128}


FINISHED = [
    *(train_line(step, "causal", "clm", 3.0 - step / 2, 120 * step, 1000.0 * step) for step in (1, 2, 3, 4)),
    eval_line(4, "causal", clm=0.9, mlm=3.5),
    {"kind": "phase", "step": 4, "phase": "causal", "objective": "clm", "tokens": 512, "samples": 16,
     "targets": 480},
    {"kind": "checkpoint", "step": 4, "phase": "causal", "tokens": 512},
    train_line(5, "masked", "mlm", 2.5, 520, 500.0),
    train_line(6, "masked", "mlm", None, 520, 500.0),
    train_line(7, "masked", "mlm", 1.5, 560, 500.0),
    train_line(8, "masked", "mlm", 1.25, 600, 500.0),
    eval_line(8, "masked", clm=1.75, mlm=1.125),
]


@pytest.fixture
def write_run(tmp_path, write_pair):
    """write_run(name="run", lines=FINISHED, **config replacements) -> a run directory without checkpoints.

    Its training data holds 8 ids equally often: an entropy of ln 8 = 2.0794.
    """
    def write(name="run", lines=FINISHED, **replacements):
        write_pair(tmp_path / "even", [[*range(8)] * 16])
        directory = tmp_path / name
        directory.mkdir()
        text = CONFIG.format(run=directory, tokenizer=tmp_path / "tokenizer", data=tmp_path / "even",
                             vocabulary=8)
        for old, new in replacements.items():
            assert f"{old}:" in text
            text = text.replace(f"{old}: {new[0]}", f"{old}: {new[1]}")
        (directory / "config.yaml").write_text(text)
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return directory
    return write


@pytest.fixture
def inspect(capsys):
    """inspect("run", ...) -> (exit code, output, error output) of `megatron-encdec inspect run ...`."""
    def call(*arguments):
        capsys.readouterr()
        code = main(["inspect", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return call


@pytest.fixture
def finished() -> list[dict]:
    """The lines of a finished run; see FINISHED."""
    return json.loads(json.dumps(FINISHED))
