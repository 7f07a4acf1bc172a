"""What is in a run directory already is continued or refused, or put aside with a word; never overwritten or cut."""

import json
import shutil
import signal

import pytest
from small_run import PATIENCE, final_bits, metrics, run_cli, start_cli, start_code, steps_done, wait_until

from megatron_encdec.cli import main
from megatron_encdec.rundir.files import sha256_file
from megatron_encdec.training import origin
from megatron_encdec.training.config import load_config
from megatron_encdec.training.plan import definite, make_plan

SAVES = ("checkpoint.every=2", "checkpoint.keep=5")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run of 12 steps, and what it was after 6 of them: checkpoints of 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("lives")
    run_cli("pretrain", root / "config.yaml", f"run.dir={directory / 'run'}", *SAVES, "--until", "6")
    shutil.copytree(directory / "run", directory / "half")
    run_cli("pretrain", root / "config.yaml", f"run.dir={directory / 'run'}", *SAVES)
    return directory


@pytest.fixture
def run(finished, tmp_path):
    """The run after 6 steps, to be spoilt."""
    shutil.copytree(finished / "half", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refused(root, capfd):
    """A function: `pretrain` on a run directory ends with 2, says what is returned, and changes no byte there."""
    def call(run, *overrides, lines=1) -> str:
        before = files(run)
        assert main(["pretrain", str(root / "config.yaml"), f"run.dir={run}", *SAVES, *overrides]) == 2
        said = capfd.readouterr().err
        assert files(run) == before and said.count("\n") == lines and "Traceback" not in said, said
        return said

    return call


def files(run):
    return {str(path): sha256_file(path) for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}


def spoil(run, how: str) -> None:
    pointer = run / "checkpoints/latest"
    pointer.unlink()
    if how == "empty":
        pointer.touch()
    elif how == "a missing step":
        pointer.write_text("step_00000008\n")
    elif how == "another name":
        pointer.write_text("step_6\n")
    elif how == "bytes":
        pointer.write_bytes(b"\xff\xfe\0")
    elif how == "a directory":
        pointer.mkdir()
    elif how == "a broken link":
        pointer.symlink_to(run / "nowhere")


@pytest.mark.parametrize("how", ["gone", "empty", "a missing step", "another name", "bytes", "a directory",
                                 "a broken link"])
def test_checkpoints_without_a_usable_pointer_are_refused_and_fallback_takes_the_newest(how, run, root, refused):
    spoil(run, how)
    for overrides in ((), ("run.seed=77",), ("phases.0.steps=5",)):
        said = refused(run, *overrides)
        assert "latest" in said and "the newest intact checkpoint is step_00000006: use it with --fallback" in said
    if how == "gone":
        assert "holds step_00000002, step_00000004, step_00000006, but its file latest is missing" in said
    config = [f"run.dir={run}", *SAVES]
    found = origin.find(make_plan(load_config(root / "config.yaml", config)), fallback=True)
    assert (found.kind, found.state.step) == ("resume", 6)
    refused(run, "run.seed=77", "--fallback", lines=3)  # the newest is of another past
    shutil.rmtree(run / "checkpoints/step_00000006")
    (run / "checkpoints/step_00000006").mkdir()  # not whole
    found = origin.find(make_plan(load_config(root / "config.yaml", config)), fallback=True)
    assert found.state.step == 4


def test_the_ways_out_of_a_lost_pointer_work(run, finished, here, root, capfd):
    spoil(run, "gone")
    shutil.copytree(run, run.with_name("second"))
    said = here("run", *SAVES, "--fallback").out
    assert "its file latest is missing" in said and "continuing from step_00000006 instead" in said
    (run.with_name("second") / "checkpoints/latest").write_text("step_00000004\n")
    said = here("second", *SAVES).out
    assert "checkpoints of later steps are here: step_00000006; each is replaced when the run gets to its step" in said
    assert "lines after step 4 are put aside in metrics.aside.jsonl; their steps are done again" in said
    for name in ("run", "second"):
        assert metrics(run.with_name(name)) == metrics(finished / "run")
        assert final_bits(run.with_name(name), 12) == final_bits(finished / "run", 12)
    aside = [json.loads(line) for line in (run.with_name("second") / "metrics.aside.jsonl").read_text().splitlines()]
    assert [line["step"] for line in aside if line["kind"] == "train"] == [5, 6]


@pytest.mark.parametrize("overrides", [(), ("run.seed=5",), ("--fallback",)])
@pytest.mark.parametrize("how", ["moved", "empty", "a broken link", "a file"])
def test_checkpoints_that_were_moved_away_are_missed(how, overrides, run, refused):
    checkpoints = run / "checkpoints"
    checkpoints.rename(run.parent / "elsewhere")
    if how == "empty":
        checkpoints.mkdir()
    elif how == "a broken link":
        checkpoints.symlink_to("nowhere")
    elif how == "a file":
        checkpoints.touch()
    said = refused(run, *overrides)
    if how in ("moved", "empty"):
        assert "step 6 was saved, but " in said and "bring that directory back, train in another run.dir, or" in said
    else:
        assert f"{checkpoints}: is " in said
    if checkpoints.is_symlink() or checkpoints.is_file():
        checkpoints.unlink()
    elif checkpoints.exists():
        checkpoints.rmdir()
    (run.parent / "elsewhere").rename(checkpoints)
    assert main(["pretrain", str(run / "config.yaml"), "--dry-run"]) == 0


def test_what_is_moved_away_makes_room_for_a_new_run(run, here, refused):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").rename(run / "old.jsonl")
    said = refused(run, "run.seed=5", lines=3)  # config.yaml alone tells that there was another run
    assert "another run was begun here, which saved nothing" in said and "\n  run_seed: 3 -> 5\n" in said
    (run / "config.yaml").rename(run / "old.yaml")
    here("run", *SAVES, "run.seed=5", "--until", "2")
    assert [line["step"] for line in metrics(run)] == [1, 2] and (run / "old.jsonl").exists()


def test_metrics_without_config_are_not_taken_over(run, refused):
    shutil.rmtree(run / "checkpoints")
    (run / "config.yaml").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"checkpoint"' not in line))
    assert "holds steps up to 6 of a run without config.yaml" in refused(run)


def test_a_launch_that_died_before_its_first_checkpoint_starts_again(root, tmp_path, here, refused):
    run, long = tmp_path / "run", ("phases.0.steps=2000", "checkpoint.every=1000")
    process = start_cli("pretrain", root / "config.yaml", f"run.dir={run}", *long, output=tmp_path / "output")
    wait_until(lambda: steps_done(run) >= 3 or process.poll() is not None, "the first steps")
    process.send_signal(signal.SIGKILL)
    process.wait()
    died = (run / "metrics.jsonl").read_bytes()
    whole = [line for line in died.splitlines(keepends=True) if line.endswith(b"\n")]
    for key, value, told in (("run.seed", 5, "run_seed: 3 -> 5"), ("data.seed", 5, "data.seed: 1234 -> 5"),
                             ("phases.0.objective", "mlm", "objective.name: 'clm' -> 'mlm'"),
                             ("optimizer.lr", "1e-4", "optimizer.lr: 0.005 -> 0.0001")):
        assert told in refused(run, *long, f"{key}={value}", lines=3)
    said = here("run", *long, "phases.1.objective=mlm:0.5", "--until", "4").out
    assert f"{len(whole)} lines of a launch that saved nothing are put aside in metrics.aside.jsonl" in said
    assert "changed: phases.1.objective.mask_ratio: 0.3 -> 0.5" in said
    assert (run / "metrics.aside.jsonl").read_bytes() == b"".join(whole)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert (run / "metrics.jsonl").read_bytes().splitlines()[0] != b""  # it begins with step 1, without a resume
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["kind"] == "train"


def test_a_first_save_killed_before_latest_is_written_is_used(root, tmp_path, finished, here):
    """The only moment at which a sound run has a checkpoint and no pointer: the same command goes on by itself."""
    code = """
import os, signal, sys
def at_latest(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("/latest"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(at_latest)
from megatron_encdec.cli import main
main(sys.argv[1:])
"""
    run = tmp_path / "run"
    killed = start_code(code, "pretrain", root / "config.yaml", f"run.dir={run}", *SAVES, output=tmp_path / "said")
    assert killed.wait(PATIENCE) == -signal.SIGKILL
    assert sorted(entry.name for entry in (run / "checkpoints").glob("[!.]*")) == ["step_00000002"]
    said = here("run", *SAVES).out
    assert "latest: the first save was not quite finished; continuing from step_00000002 instead" in said
    assert metrics(run) == metrics(finished / "run") and final_bits(run, 12) == final_bits(finished / "run", 12)


def test_metrics_lost_beside_good_checkpoints_are_said(run, here):
    (run / "metrics.jsonl").unlink()
    assert "lines before step 6 were lost or altered" in here("run", *SAVES).out
    assert [line["step"] for line in metrics(run)] == list(range(7, 13))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_file_that_cannot_be_written_is_one_line(name, run, here):
    (run / name).unlink()
    (run / name).mkdir()
    said = here("run", *SAVES, code=2).err
    assert f"{run / name}" in said and said.count("\n") == 1


def test_fallback_does_not_take_what_a_later_life_left_behind(run, here, root):
    """After going on from step 2, step 6 is of a life that was given up; a damaged 4 falls back to 2."""
    (run / "checkpoints/latest").write_text("step_00000002\n")
    here("run", *SAVES, "--until", "4")
    (run / "checkpoints/step_00000004/common.pt").unlink()
    found = origin.find(make_plan(load_config(root / "config.yaml", [f"run.dir={run}", *SAVES])), fallback=True)
    assert found.state.step == 2 and found.fallback["used"] == "step_00000002"


def test_a_fork_without_a_step_means_what_its_first_launch_meant(run, root, tmp_path):
    fork = tmp_path / "fork"
    config = [f"run.from={{path: {run}, step: 4}}", f"run.dir={fork}", *SAVES]
    fork.mkdir()
    shutil.copy(run / "config.yaml", fork)  # as a launch that died left it
    text = (fork / "config.yaml").read_text().replace("from: null", f"from: {{path: {run}, step: 4, state: all}}")
    (fork / "config.yaml").write_text(text)
    plain = load_config(root / "config.yaml", [f"run.from={{path: {run}}}", f"run.dir={fork}", *SAVES])
    assert definite(plain.run).step == 4
    assert origin.find(make_plan(plain)).kind == "fork"
    assert origin.find(make_plan(load_config(root / "config.yaml", config))).state.step == 4


@pytest.mark.parametrize("command", [["export", "RUN", "OUT"], ["inspect", "checkpoint", "RUN"],
                                     ["pretrain", "CONFIG", "run.dir=OUT", "--fork", "RUN"]])
def test_others_that_read_the_run_say_how_to_name_a_checkpoint(command, run, root, tmp_path, capfd):
    spoil(run, "gone")
    places = {"RUN": run, "OUT": tmp_path / "out", "CONFIG": root / "config.yaml"}

    def call(at=""):
        words = [word if word != "run.dir=OUT" else f"run.dir={tmp_path / 'out'}" for word in command]
        return main([str(places.get(word, word)) + (at if word == "RUN" else "") for word in words])

    assert call() == 2
    said = capfd.readouterr().err
    assert "or name a step, as in" in said and "--fallback" not in said and said.count("\n") == 1
    if command[0] == "inspect":
        assert call("@4") == 0
