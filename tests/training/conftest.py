"""A corpus, a tokenizer and token files made once, then `megatron-encdec pretrain` as real processes."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_run import run_cli, workspace


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A `workspace`, made once."""
    return workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def unbroken(root, tmp_path_factory) -> Path:
    """A run of the config that nothing stopped: 12 steps. Only to be read."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}")
    return run


@pytest.fixture(scope="session")
def half(root, tmp_path_factory) -> Path:
    """The same, stopped after 6 steps, at the switch. Only to be read."""
    run = tmp_path_factory.mktemp("half") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", "--until", "6")
    return run


@pytest.fixture
def begun(half, tmp_path):
    """A function: `half` as a run of the test's own, `tmp_path / name`."""
    def call(name: str) -> Path:
        run = Path(shutil.copytree(half, tmp_path / name))
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace(str(half), str(run)))
        return run

    return call


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
