"""A tree of fine-tuning results: `finetune` writes it, `study` reads it; the layout of the paper's published runs.

    TREE/<model>/<SC|TC|QA|IR>/<dataset>/lr<LR>_sd<seed>/     a run; of retrieval: <train set>_lr<LR>_sd<seed>/
    TREE/<model>/MTEB/<task>/frozen/                          the model as it is (frozen.py); learning rate 0, seed 0
        results.json    {"validation": {"score": 0.92, "scores_i": [...]}, "test": ...}: finished, and never repeated
        failure.json    {"reason", "when", "traceback"}: it failed (rundir/failure.py); repeated only when asked to
        run.lock        held while a process works on it, let go of however that process ends (rundir/lock.py); also
                        in the dataset's folder, while grid.json is written
    TREE/<model>/<family>/<dataset>/grid.json                 {"runs": [...]}: all runs planned, so that a report knows
                                                              what it misses (optional)
    TREE/<model>/model.json                                   {"step", "series", "run", ...}: what export.json says of
                                                              the model's pretraining (optional)
    TREE/baselines/<family>/<dataset>.json                    what costs no encoder (baselines.py)

A run with neither results nor a failure was never begun, or was killed: it is done (again).

    1. `plan`, `state_of`                    before a sweep: what there will be, what is to do
    2. `write_results`                       the end of a run; or `rundir.failure.write_failure`
    3. `planned`, `read_scores`, `read_reason`, `score_of`      back, checked: `UserError` names file and key
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_encdec.platform.errors import RunFailed, UserError
from megatron_encdec.rundir.failure import NAME as FAILURE
from megatron_encdec.rundir.failure import forget_failure
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.rundir.lock import FolderLock

ZERO_SHOT, FROZEN = "MTEB", "frozen"  # the family and the only run of a model that is evaluated as it is
FAMILIES = ("SC", "TC", "QA", "IR", ZERO_SHOT)
RESULTS, GRID, BASELINES = "results.json", "grid.json", "baselines"
RECORD = "record.json"  # of a run: how it went, and hashes of what it was made of
SETTINGS = "cell.json"  # all settings of a run, a place of the grid: models x datasets x rates x seeds
MODEL, EXPORT = "model.json", "export.json"
FINISHED, FAILED, TODO = "finished", "failed", "todo"
_NAME = re.compile(r"(?:(?P<train_set>.+)_)?lr(?P<rate>[0-9.eE+-]+)_sd(?P<seed>\d+)")
_PATIENCE = 60.0  # seconds for another sweep to write its plan
_WAY_OUT = "mend it, or delete it and give the command again that wrote it"


def name_of_run(rate: float, seed: int, train_set: str = "") -> str:
    """The folder of a run, such as lr1e-05_sd0 or msmarco_pairs_lr1e-05_sd0; `FROZEN` at rate 0."""
    if rate == 0:
        return FROZEN
    return f"{train_set}{'_' if train_set else ''}lr{rate:g}_sd{seed}"


def place_of_run(name: str) -> tuple[str, float, int] | None:
    """Train set, learning rate and seed of the folder `name`; None where that is not called as a run is."""
    if name == FROZEN:
        return "", 0.0, 0
    match = _NAME.fullmatch(name)
    try:
        rate = float(match["rate"]) if match else 0.0
    except ValueError:
        return None
    return (match["train_set"] or "", rate, int(match["seed"])) if 0.0 < rate < math.inf else None


def state_of(directory: Path) -> str:
    """FINISHED, FAILED or TODO."""
    if (directory / RESULTS).is_file():
        return FINISHED
    return FAILED if (directory / FAILURE).is_file() else TODO


def write_results(directory: Path, results: dict) -> None:
    """Finish the run; a failure of an earlier attempt is forgotten."""
    write_json_atomic(directory / RESULTS, results)
    forget_failure(directory)


def read_scores(path: Path) -> tuple[float, float]:
    """The scores of validation and test in a results.json, from 0 to 1."""
    record = read_json(path)
    for split in ("validation", "test"):  # scores of single examples: kept for others, not read here
        if isinstance(part := record.get(split), dict) and not isinstance(part.get("scores_i", []), list):
            raise UserError(f"{path}: {split}.scores_i: expected a list")
    return score_of(record, "validation", path), score_of(record, "test", path)


def read_reason(path: Path) -> str:
    """Why a run failed, by its failure.json."""
    reason = read_json(path).get("reason")
    if not isinstance(reason, str) or not reason:
        raise UserError(f"{path}: reason: expected a sentence, found {reason!r}")
    return reason


def reason_of(directory: Path) -> str:
    """The same of a run's folder, or why that cannot be read."""
    try:
        return read_reason(directory / FAILURE)
    except UserError as error:
        return str(error)


def plan(directories: Iterable[Path]) -> None:
    """Add runs to the grid.json of their datasets, one process at a time. Raises `UserError` where one is there that
    cannot be read."""
    by_dataset: dict[Path, list[str]] = defaultdict(list)
    for directory in directories:
        by_dataset[directory.parent].append(directory.name)
    for dataset, names in by_dataset.items():
        dataset.mkdir(parents=True, exist_ok=True)
        if set(names) - set(_known(dataset / GRID)):
            with FolderLock(dataset, "results", patience=_PATIENCE):  # other sweeps add theirs meanwhile
                write_json_atomic(dataset / GRID, {"runs": list(dict.fromkeys([*_known(dataset / GRID), *names]))})


def _known(path: Path) -> list[str]:
    try:
        return planned(path) if path.exists() else []
    except UserError as error:  # what it listed would be lost without a word
        raise UserError(f"{error} (it then lists the runs of this sweep alone)") from None


def check_scores(results: dict) -> None:
    """Raises `RunFailed` where a split has no score: a correlation with what is all the same is no number."""
    for split in ("validation", "test"):
        if not math.isfinite(results[split]["score"]):
            raise RunFailed(f"{split} has no score ({results[split]['score']}): what was predicted there, or what it "
                            "is compared with, is all the same, or is no number")


def record_model(tree: Path, name: str, export: Path, series: Sequence[str] | None = None) -> None:
    """model.json of the model `name`: which state it is, by the export.json of the directory `export`; nothing where
    that has none. series: None leaves what is recorded. Raises `UserError` where the results in its folder are of
    another state."""
    if not (export / EXPORT).is_file():
        return
    exported = read_json(export / EXPORT)
    path = tree / name / MODEL
    found = read_json(path) if path.exists() else {}
    record = {key: exported.get(key) for key in ("step", "history_hash", "run")}
    record["series"] = found.get("series", []) if series is None else list(series)
    if found.get("history_hash", record["history_hash"]) != record["history_hash"]:
        raise UserError(f"{path}: the results there are of another model (step {found.get('step')}, history "
                        f"{found['history_hash'][:8]}; {export} is of step {record['step']}, history "
                        f"{record['history_hash'][:8]}); give it another `name`, or `results` another folder")
    if found != record:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, record)


def planned(path: Path) -> list[str]:
    """The names of runs in the grid.json at `path`."""
    names = read_json(path).get("runs")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: runs: expected a list of folder names such as lr1e-05_sd0, found {names!r}; "
                        f"{_WAY_OUT}")
    return list(dict.fromkeys(names))


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises `UserError` naming the file where it holds anything else."""
    try:
        record = orjson.loads(path.read_bytes())
        if isinstance(record, dict):
            return record
        problem = f"expected a JSON object, found {type(record).__name__}"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except orjson.JSONDecodeError as error:  # NaN and Infinity are no JSON either
        problem = f"not valid JSON ({error})"
    raise UserError(f"{path}: {problem}; {_WAY_OUT}")


def score_of(record: Any, split: str, path: Path, where: str = "") -> float:
    """`record[split]["score"]`, checked: a finite number from 0 to 1, of correlations from -1. `where` names `record`
    inside its file."""
    part = record.get(split) if isinstance(record, dict) else None
    if not isinstance(part, dict) or "score" not in part:
        raise UserError(f"{path}: {where}{split}.score is missing")
    score = part["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise UserError(f"{path}: {where}{split}.score: expected a number, found {score!r}")
    if not -1.0 <= score <= 1.0:
        raise UserError(f"{path}: {where}{split}.score: expected a fraction from 0 to 1, found {score!r}"
                        f"{' (per cent? divide by 100)' if 1.0 < score <= 100.0 else ''}")
    return float(score)
