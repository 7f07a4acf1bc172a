"""Data, a bf16 run of two phases with its checkpoints, and tiny trunks of every shape."""

import random
from pathlib import Path

import pytest
import torch
from small_run import BASE

from megatron_encdec.cli import main
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.text.tokenizer import train_tokenizer

CLM_END, END = 6, 9


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A directory with data, its tokenizer of an odd vocabulary, and a config.yaml to train with."""
    directory = tmp_path_factory.mktemp("interop")
    draw = random.Random(0)
    words = [a + b for a in ("re", "un", "over", "mis") for b in ("turn", "told", "read", "wind", "made")]
    texts = [" ".join(draw.choice(words) for _ in range(draw.randint(5, 60))) for _ in range(200)]
    (directory / "corpus").mkdir()
    for number, text in enumerate(texts):
        (directory / "corpus" / f"{number}.txt").write_text(text)
    assert main(["preprocess", "--input", str(directory / "corpus"), "--tokenizer", str(directory / "tokenizer"),
                 "--train-tokenizer", "301", "--validation-percent", "20", "--output", str(directory / "text"),
                 "--workers", "1"]) == 0
    (directory / "config.yaml").write_text(BASE.format(root=directory))
    return directory


@pytest.fixture(scope="session")
def run_directory(prepared) -> Path:
    """A run in bf16: clm to step 6, mlm to step 9, a checkpoint at each end."""
    assert main(["pretrain", str(prepared / "config.yaml"), f"run.dir={prepared / 'run'}",
                 f"phases.1.steps={END - CLM_END}", "precision.dtype=bf16", "evaluation.every=6"]) == 0
    return prepared / "run"


@pytest.fixture
def random_trunk(topology):
    """random_trunk(**sizes) -> trunk in evaluation mode; weights large enough for attention to matter."""
    def build(**sizes):
        model = ModelConfig(**{**dict(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4,
                                      num_query_groups=2, vocabulary_size=8191, init_std=0.2), **sizes})
        trunk = build_trunk(model, topology, torch.float32, sequence_length=32, seed=11).eval()
        with torch.no_grad():  # norm weights start at one, which would hide a mix-up of theirs
            generator = torch.Generator().manual_seed(0)
            for parameter in trunk.parameters():
                if parameter.dim() == 1:
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        return trunk
    return build


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory) -> Path:
    """Our own tokenizer of at most 300 entries, its mask among them."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["the encoder reads every word", "a mask hides one word in three"] * 20), 300, directory)
    return directory
