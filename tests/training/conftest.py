"""A corpus, a tokenizer and token files made once, then `megatron-encdec pretrain` as real processes."""

import json
import os
import random
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_run import BASE, run_cli

from megatron_encdec.cli import main


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A directory with `tokenizer/`, `text.*`, `text.validation.*` and `config.yaml` (run.dir left to the test)."""
    directory = tmp_path_factory.mktemp("workspace")
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("re", "un", "over", "mis", "pre") for b in
             ("turn", "told", "read", "wind", "made", "take", "cast", "lead")]
    with open(directory / "corpus.jsonl", "w") as file:
        for _ in range(400):
            text = " ".join(draw.choice(words) for _ in range(draw.randint(5, 60)))
            file.write(json.dumps({"text": text}) + "\n")
    run_cli("preprocess", "--input", directory / "corpus.jsonl", "--tokenizer", directory / "tokenizer",
            "--train-tokenizer", "301", "--validation-percent", "10", "--output", directory / "text",
            "--workers", "1")
    (directory / "config.yaml").write_text(BASE.format(root=directory))
    return directory


@pytest.fixture
def pretrain(root, tmp_path):
    """A function: run the config (with overrides) in `tmp_path / name`; returns the run directory."""
    def call(name: str, *arguments: str, **options) -> Path:
        run_cli("pretrain", root / "config.yaml", f"run.dir={tmp_path / name}", *arguments, **options)
        return tmp_path / name

    return call


@dataclass
class Ended:
    """How a `pretrain` in this process ended."""

    code: int
    run: Path
    out: str
    err: str


@pytest.fixture
def here(root, tmp_path):
    """A function: one rank, trained in a fork of this process (seconds less than a new one, and gloo's threads,
    some fifty a run that torch never ends, go with it)."""
    def call(name: str, *arguments: str, code: int = 0) -> Ended:
        said = [tmp_path / f".{name.replace('/', '_')}.{stream}" for stream in ("out", "err")]
        child = os.fork()
        if child == 0:
            _train_and_exit(["pretrain", str(root / "config.yaml"), f"run.dir={tmp_path / name}",
                             *map(str, arguments)], said)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out, err = (path.read_text() for path in said)
        assert ended == code, out + err
        return Ended(ended, tmp_path / name, out, err)

    return call


def _train_and_exit(command: list[str], said: list[Path]) -> None:
    code = 70
    try:
        sys.stdout, sys.stderr = (open(path, "w") for path in said)  # noqa: SIM115  (closed with the process)
        torch.set_num_threads(1)  # as run_cli's processes have it: bits are compared
        code = main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
