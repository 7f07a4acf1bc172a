"""Trackers: the same numbers in real back ends, one run there after a resume, and training that never waits."""

import json
import sqlite3
import struct
import time
from pathlib import Path

import pytest
from small_run import PATIENCE, final_bits, fork, metrics, run_cli, run_code, workspace

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import build
from megatron_encdec.training.config import LoggingSettings
from megatron_encdec.training.trackers import Trackers

CONFIG = "run: {dir: here}\nmodel: {num_layers: 2}\nphases: [{name: causal}]\n"


@pytest.fixture
def track(tmp_path):
    """track(name, points, step=0) -> what it said; points: {step: loss}, of a run with 100 tokens a step."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(CONFIG)

    def call(name: str, points: dict[int, float], step: int = 0) -> list[str]:
        said: list[str] = []
        trackers = Trackers([name], tmp_path / "run", step, said.append)
        for at, loss in points.items():
            trackers.log(at, 100 * at, {"train/loss": loss, "validation/mlm": None})
        trackers.close(120.0)
        return said
    return call


def written_in(folder: Path) -> dict[int, float]:
    """The losses in a folder of event files, as TensorBoard shows them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    return {one.step: one.value for one in events.Scalars("train/loss")}


def test_tensorboard_by_step_and_by_tokens(track, tmp_path):
    pytest.importorskip("tensorboard")
    assert track("tensorboard", {1: 3.0, 2: 2.5, 3: 2.25}) == []
    assert written_in(tmp_path / "run/tensorboard") == {1: 3.0, 2: 2.5, 3: 2.25}
    assert written_in(tmp_path / "run/tensorboard/by_tokens") == {100: 3.0, 200: 2.5, 300: 2.25}


def test_tensorboard_shows_steps_that_were_done_again_once(track, tmp_path):
    pytest.importorskip("tensorboard")
    track("tensorboard", {1: 3.0, 2: 2.5, 3: 9.0, 4: 9.0})
    track("tensorboard", {3: 2.25}, step=2)  # goes on from a checkpoint of step 2
    assert written_in(tmp_path / "run/tensorboard") == {1: 3.0, 2: 2.5, 3: 2.25}
    assert written_in(tmp_path / "run/tensorboard/by_tokens") == {100: 3.0, 200: 2.5, 300: 2.25}


@pytest.mark.parametrize("chosen", [True, False], ids=["files", "database of the run"])
def test_mlflow_goes_on_in_the_same_run(chosen, track, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    store = (tmp_path / "store").as_uri() if chosen else f"sqlite:///{tmp_path}/run/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store if chosen else "")
    if chosen:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert track("mlflow", {1: 3.0, 2: 2.5}) == []
    assert track("mlflow", {3: 2.25}, step=2) == []
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("megatron-encdec").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run/trackers/mlflow.json").read_text())["id"]
    assert run.info.status == "FINISHED" and run.data.params["model.num_layers"] == "2"
    for name, factor in (("train/loss", 1), ("by_tokens/train/loss", 100)):
        found = {one.step: one.value for one in client.get_metric_history(run.info.run_id, name)}
        assert found == {1 * factor: 3.0, 2 * factor: 2.5, 3 * factor: 2.25}


def written_for_wandb(path: Path) -> list[dict]:
    """The points in a file that `wandb sync` would send: blocks of 32 KiB, in them records with a head of 7 bytes
    (LevelDB's log), each the whole (1) or the last (4) of a protobuf message, or a part before."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, message, found = path.read_bytes(), 7, b"", []
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place:place + 7])
        message += data[place + 7:place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record, message = Record.FromString(message), b""
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json)
                      for item in record.history.item}
            found += [{name: value for name, value in values.items() if name[0] != "_"}] if values else []
    return found


def test_wandb_goes_on_offline_under_the_same_id(track, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # without a key of the user's
    said = track("wandb", {1: 3.0, 2: 2.5}) + track("wandb", {3: 2.25}, step=2)
    assert len(said) == 2 and all("offline; send it later with `wandb sync" in line for line in said), said
    name = json.loads((tmp_path / "run/trackers/wandb.json").read_text())["id"]
    files = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert [point for path in files for point in written_for_wandb(path)] == [
        {"train/loss": loss, "step": step, "tokens": 100 * step} for step, loss in ((1, 3.0), (2, 2.5), (3, 2.25))]


def test_trackio_goes_on_in_the_same_run(track, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert track("trackio", {1: 3.0, 2: 2.5}) == []
    assert track("trackio", {3: 2.25}, step=2) == []
    name = json.loads((tmp_path / "run/trackers/trackio.json").read_text())["name"]
    (store,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(store) as connection:
        rows = connection.execute("select step, metrics from metrics where run_name = ? order by step", [name])
    assert [(step, json.loads(text)["train/loss"], json.loads(text)["tokens"]) for step, text in rows] == [
        (1, 3.0, 100), (2, 2.5, 200), (3, 2.25, 300)]


def fake(directory: Path, source: str) -> str:
    """A package `trackio` of that source; the PYTHONPATH that finds it before any other."""
    (directory / "packages").mkdir()
    (directory / "packages/trackio.py").write_text(source)
    return str(directory / "packages")


def test_a_package_that_is_missing_is_named_with_its_command(track, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", fake(tmp_path, "import wandb_that_is_not_there"))
    (said,) = track("trackio", {1: 3.0})
    assert said == ("tracker trackio: gave up (the package wandb_that_is_not_there is not installed: pip install "
                    "wandb_that_is_not_there); training goes on without it, metrics.jsonl has everything")


def test_a_tracker_that_hangs_costs_no_time_and_its_drops_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", fake(tmp_path, "import time\ntime.sleep(3600)"))
    said: list[str] = []
    trackers = Trackers(["trackio"], tmp_path, 0, said.append)
    began, points = time.process_time(), 40_000
    for step in range(points):
        trackers.log(step, step, {"train/loss": 1.0, "train/lr": 1e-3, "train/grad_norm": 1.0})
    assert (time.process_time() - began) / points < 1e-3
    trackers.close(1.0)
    assert "takes points more slowly than they come" in said[0]
    assert "had not written everything 1 s after the last step, and was ended" in said[1]
    dropped, of = (int(word.replace(",", "")) for word in said[2].split()[2:5:2])
    assert 0 < dropped < of == points and len(said) == 3


def test_what_a_config_means():
    def trackers(**keys):
        return build(LoggingSettings, keys).trackers

    assert trackers() is None and trackers(tensorboard=True) is None  # where it is installed
    assert trackers(tensorboard=False) == () == trackers(trackers=[])
    assert trackers(trackers=["wandb", "mlflow", "wandb"]) == ("wandb", "mlflow")
    assert trackers(tensorboard=True, trackers=["wandb"]) == ("tensorboard", "wandb")
    assert trackers(tensorboard=False, trackers=["wandb"]) == ("wandb",)
    with pytest.raises(UserError, match="tensorboard: false, but logging.trackers names it"):
        trackers(tensorboard=False, trackers=["tensorboard"])
    with pytest.raises(UserError, match="trackers.0: 'wandbb' is not one of tensorboard, wandb, mlflow, trackio"):
        trackers(trackers=["wandbb"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("trackers"))


RUN = """
import sys
from megatron_encdec.training import report
report.PATIENCE = 2.0
from megatron_encdec.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("source", ["raise RuntimeError('the server\\nis on fire')", "import time\ntime.sleep(3600)"],
                         ids=["raises", "hangs"])
def test_a_broken_tracker_changes_no_bit_of_a_run(source, place, tmp_path):
    config = place / "config.yaml"
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    run_cli("pretrain", config, f"run.dir={alone}")
    environment = {"PYTHONPATH": fake(tmp_path, source)}
    child = fork(run_code, RUN, "pretrain", config, f"run.dir={beside}", "logging.trackers=[trackio]",
                 "logging.tensorboard=null", said=[tmp_path / "said"] * 2, **environment)
    assert child.wait(PATIENCE) == 0
    said = (tmp_path / "said").read_text()
    assert ("tracker trackio: gave up (RuntimeError: the server is on fire)" if "raise" in source else
            "tracker trackio: had not written everything 2 s after the last step") in said
    assert metrics(beside) == metrics(alone) and final_bits(beside, 12) == final_bits(alone, 12)


def test_a_run_that_goes_on_is_one_curve(place, tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    for until in (5, 12):
        run_cli("pretrain", place / "config.yaml", f"run.dir={run}", "logging={}", "--until", until)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = metrics(run)
    for name, key in (("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "grad_norm")):
        assert [(one.step, one.value) for one in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
    assert [one.step for one in events.Scalars("validation/mlm")] == [line["step"] for line in metrics(run, "eval")]
