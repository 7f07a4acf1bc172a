"""Sources whose files are gone: no matter where the run is past them, else refused by key."""

import shutil

import pytest
from small_run import final_bits, metrics, run_cli

from megatron_encdec.cli import main


@pytest.fixture(scope="module")
def begun(root, tmp_path_factory):
    """The files of phase 0 are a copy. Runs of 12 steps: `whole`, and `cut`, stopped after 8; then the copy goes."""
    here = tmp_path_factory.mktemp("gone")
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{root / 'text.validation'}{suffix}", here / f"first{suffix}")
    (here / "config.yaml").write_text((root / "config.yaml").read_text().replace(
        "steps: 6}", f"steps: 6, data: {{train: [{{path: {here / 'first'}}}]}}}}", 1).replace(
        "steps: 6}\noptimizer", f"steps: 6, data: {{train: [{{path: {root / 'text'}}}]}}}}\noptimizer"))
    asked = ("data.train=[{path: nowhere/unused}]", "checkpoint={every: 4, keep: 5}")
    for name, until in (("whole", 12), ("cut", 8)):
        run_cli("pretrain", here / "config.yaml", f"run.dir={here / name}", *asked, "--until", str(until))
    for path in here.glob("first.*"):
        path.unlink()
    return here, asked


def words_of(begun, run, *more: str) -> list[str]:
    here, asked = begun
    return ["pretrain", str(here / "config.yaml"), f"run.dir={run}", *asked, *more]


def test_a_run_that_is_past_it_goes_on_with_the_same_bits(begun, tmp_path):
    here, run = begun[0], tmp_path / "run"
    shutil.copytree(here / "cut", run, symlinks=True)
    planned = run_cli(*words_of(begun, run, "--dry-run")).stdout
    assert "missing" not in planned and "epochs of the training data" not in planned
    run_cli(*words_of(begun, run))
    assert metrics(run) == metrics(here / "whole") and final_bits(run, 12) == final_bits(here / "whole", 12)
    states = [(one / "checkpoints/step_00000012/run_state.json").read_text() for one in (run, here / "whole")]
    assert states[0].split('"history"')[1].split('"topology"')[0] == states[1].split('"history"')[1].split(
        '"topology"')[0]
    assert main(["inspect", "run", str(here / "config.yaml"), f"run.dir={run}", *begun[1], "--sample", "60"]) == 0


def test_so_does_a_fork(begun, tmp_path, capsys):
    assert main(words_of(begun, tmp_path / "fork", "--fork", f"{begun[0] / 'whole'}@6", "--dry-run")) == 0
    assert "missing" not in capsys.readouterr().out


def test_what_is_still_read_is_refused_by_its_key(begun, tmp_path, capsys):
    here = begun[0]
    whole = here / "whole"
    for more, says in (
            ((), ""), ((f"run.from.path={whole}", "run.from.step=8", "run.from.state=weights"), ""),
            (("--fork", f"{whole}@4"), f"{whole} goes on after step 4, and steps 5..6 read it")):
        assert main(words_of(begun, tmp_path / "run", *more)) == 2
        said = capsys.readouterr().err
        assert f"phases.0.data.train.0.path: {here / 'first'}.bin: missing; copy it again" in said and says in said
        assert said.count("\n") == 1


def test_another_path_is_not_taken_for_it(begun, capsys):
    here = begun[0]
    assert main(words_of(begun, here / "cut", "phases.0.data.train.0.path=nowhere/other")) == 2
    said = capsys.readouterr().err
    assert "phases.0.data.train.0.path: nowhere/other.bin: missing" in said and said.count("\n") == 1
    assert f"is past it, but {here / 'cut'}/config.yaml has no such path: give the one that stands there" in said


def test_an_earlier_checkpoint_may_need_it_after_all(begun, tmp_path):
    here, run = begun[0], tmp_path / "run"
    shutil.copytree(here / "cut", run, symlinks=True)
    for step in (8, 6):
        next((run / f"checkpoints/step_{step:08d}").glob("*.distcp")).write_bytes(b"damaged")
    said = run_cli(*words_of(begun, run, "--fallback"), code=2).stderr
    assert f"phases.0.data.train.0.path: {here / 'first'}: its files are gone" in said and "from step 5 on" in said
    assert said.count("\n") == 1


def test_a_sample_of_it_cannot_be_shown(begun, capsys):
    here, asked = begun
    assert main(["inspect", "run", str(here / "config.yaml"), f"run.dir={here / 'cut'}", *asked, "--sample", "3"]) == 2
    assert f"phases.0.data.train.0.path: {here / 'first'}: its files are gone" in capsys.readouterr().err
