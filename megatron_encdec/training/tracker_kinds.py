"""The trackers: `KINDS` by name, each made for a run directory and the step that the run goes on after.

A tracker has `log(points)` and `finish()`, runs in a process of its own (tracker_process.py), and may raise or take as
long as it likes. Its package is imported when it is made. A run that goes on has the same run there: the id stands in
trackers/NAME.json of the run directory. Steps that were done again are told again; what is shown of them is the
tracker's own way. Curves are by step and by tokens.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_encdec.rundir.files import write_json_atomic

PROJECT = "megatron-encdec"  # or experiment, where the environment names none
BY_TOKENS = "by_tokens"
FLUSHED = 10.0  # seconds until points can be seen in TensorBoard


class TensorBoard:
    """Event files in tensorboard/ by step, and in tensorboard/by_tokens/ by tokens. Points of steps that are done again
    are taken back by the file of the launch that does them."""

    def __init__(self, directory: str, step: int, say: Callable[[str], None]):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, folder = Event, Summary, Path(directory) / "tensorboard"
        self._writers = [EventFileWriter(str(folder)), EventFileWriter(str(folder / BY_TOKENS))]
        self._flushed, self._purge = time.monotonic(), SessionLog(status=SessionLog.START) if step else None

    def log(self, points: Sequence) -> None:
        for point in points:
            summary = self._summary(value=[self._summary.Value(tag=name, simple_value=value)
                                           for name, value in point.values.items()])
            for writer, place in zip(self._writers, (point.step, point.tokens), strict=True):
                if self._purge is not None:  # from this place on, whatever an earlier launch wrote
                    writer.add_event(self._event(wall_time=time.time(), step=place, session_log=self._purge))
                writer.add_event(self._event(wall_time=time.time(), step=place, summary=summary))
            self._purge = None
        if time.monotonic() - self._flushed > FLUSHED:
            self._flushed = time.monotonic()
            for writer in self._writers:
                writer.flush()

    def finish(self) -> None:
        for writer in self._writers:
            writer.close()


class Wandb:
    """Weights & Biases: project, entity and mode from its environment variables; without a key, or without an answer
    from its server, offline in wandb/ of the run directory."""

    def __init__(self, directory: str, step: int, say: Callable[[str], None]):
        import wandb

        record = _record(directory, "wandb") or {"id": secrets.token_hex(6)}
        _remember(directory, "wandb", record)
        settings: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT), "name": Path(directory).name, "dir": directory,
            "id": record["id"], "resume": "allow", "config": _config(directory)}
        mode = os.environ.get("WANDB_MODE") or (None if _has_key() else "offline")
        try:
            self._run = wandb.init(**settings, mode=mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            say(f"no answer ({error}); going on offline")
            mode, self._run = "offline", wandb.init(**settings, mode="offline")
        if mode == "offline":
            say(f"offline; send it later with `wandb sync --append {directory}/wandb/offline-run-*-{record['id']}`")
        for axis in ("step", "tokens"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")  # so that steps may be done again; tokens: choose it as x axis

    def log(self, points: Sequence) -> None:
        for point in points:
            self._run.log({**point.values, "step": point.step, "tokens": point.tokens})

    def finish(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow: the server or store of MLFLOW_TRACKING_URI, else mlflow.db in the run directory (its store of plain files
    is not kept up any more). Metrics by step, and by tokens under by_tokens/."""

    def __init__(self, directory: str, step: int, say: Callable[[str], None]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        chosen = os.environ.get("MLFLOW_TRACKING_URI")
        self._metric, self._client = Metric, MlflowClient(chosen or f"sqlite:///{directory}/mlflow.db")
        record = _record(directory, "mlflow")
        try:
            self._id = record and self._client.get_run(record["id"]).info.run_id
        except MlflowException as error:
            say(f"run {record['id']} is not there any more ({error}); beginning another")
            self._id = None
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        files = None if chosen else (Path(directory) / "mlruns").as_uri()  # else in the folder that it runs in
        where = experiment.experiment_id if experiment else self._client.create_experiment(name, files)
        self._id = self._client.create_run(where, run_name=Path(directory).name).info.run_id
        _remember(directory, "mlflow", {"id": self._id})
        parameters = [Param(key, str(value)[:500]) for key, value in _flat(_config(directory)).items()]
        for first in range(0, len(parameters), 100):  # the most that a server takes at once
            self._client.log_batch(self._id, params=parameters[first:first + 100])

    def log(self, points: Sequence) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(f"{prefix}{name}", value, now, place) for point in points
                   for prefix, place in (("", point.step), (f"{BY_TOKENS}/", point.tokens))
                   for name, value in point.values.items()]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[first:first + 1000])

    def finish(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """trackio, in its local store (TRACKIO_DIR) or the space that its environment variables name; tokens are a metric
    that can be chosen as x axis."""

    def __init__(self, directory: str, step: int, say: Callable[[str], None]):
        import trackio

        record = _record(directory, "trackio") or {
            "project": os.environ.get("TRACKIO_PROJECT", PROJECT),
            "name": f"{Path(directory).name}-{secrets.token_hex(3)}"}  # a run is known by its name there
        _remember(directory, "trackio", record)
        self._trackio = trackio
        trackio.init(project=record["project"], name=record["name"], resume="allow",
                     config=_flat(_config(directory)))

    def log(self, points: Sequence) -> None:
        for point in points:
            self._trackio.log({**point.values, "tokens": point.tokens}, step=point.step)

    def finish(self) -> None:
        self._trackio.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


def _place(directory: str, name: str) -> Path:
    return Path(directory) / "trackers" / f"{name}.json"


def _record(directory: str, name: str) -> dict | None:
    """By which id the tracker knows this run; None where it does not yet."""
    try:
        return json.loads(_place(directory, name).read_bytes())
    except (OSError, ValueError):
        return None


def _remember(directory: str, name: str, record: dict) -> None:
    write_json_atomic(_place(directory, name), record)


def _config(directory: str) -> dict:
    """The run's config, as far as it can be read."""
    try:
        return yaml.safe_load((Path(directory) / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """`{"optimizer.lr": 0.001, ...}`; lists by number."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {name: value}
    return {key: one for part, inner in pairs for key, one in _flat(inner, f"{name}.{part}" if name else
                                                                    str(part)).items()}


def _has_key() -> bool:
    """Whether wandb knows who the user is."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
