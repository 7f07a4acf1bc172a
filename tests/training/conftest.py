"""A corpus, a tokenizer and token files made once, then `megatron-encdec pretrain` as real processes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from small_run import make_workspace, run_cli


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """`small_run.make_workspace`, once."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def pretrain(root, tmp_path):
    """A function: run the config (with overrides) in `tmp_path / name`; returns the run directory."""
    def call(name: str, *arguments: str, **options) -> Path:
        run_cli("pretrain", root / "config.yaml", f"run.dir={tmp_path / name}", *arguments, **options)
        return tmp_path / name

    return call


@dataclass
class Ended:
    """How a `pretrain` ended."""

    code: int
    run: Path
    out: str
    err: str


@pytest.fixture
def here(root, tmp_path):
    """A function: run the config in `tmp_path / name`, which ends with the exit code `code`."""
    def call(name: str, *arguments: str, code: int = 0) -> Ended:
        run = tmp_path / name
        ended = run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *arguments, code=code)
        return Ended(ended.returncode, run, ended.stdout, ended.stderr)

    return call
