"""Runs for the tests of sweeps: a logistic regression that trains for real in milliseconds, and ways to go wrong.

As a script it is a sweep in a process of its own:  python -m sweep_runs TREE WORKERS RATES SEEDS HOW [retry]
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from small_run import take_over

from megatron_encdec.finetune.sweep import Sweep
from megatron_encdec.platform.errors import UserError

STEPS = 40
LOADED: dict[str, np.ndarray] = {}  # what a process keeps between runs
DONE: list[str] = []  # runs of this process


@dataclass(frozen=True)
class LogisticRun:
    """A run: `how` is plain, slow, nan (its score), or a way to fail at `rate` 0.4."""

    directory: Path
    rate: float
    seed: int
    how: str = "plain"


def grid(tree: Path, rates=(0.1, 0.2, 0.4), seeds=(0, 1), how: str = "plain", dataset: str = "blobs"):
    """Cells of `TREE/m/SC/<dataset>`."""
    return [LogisticRun(tree / f"m/SC/{dataset}" / f"lr{rate:g}_sd{seed}", rate, seed, how)
            for rate in rates for seed in seeds]


def train(run: LogisticRun, report) -> dict:
    """Fit; `examples_ND` are loaded once in a process."""
    if "examples" not in LOADED:
        LOADED["examples"] = np.random.default_rng(0).normal(size=(200, 8))
    examples_ND, rng = LOADED["examples"], np.random.default_rng(run.seed)
    labels_N = examples_ND @ np.arange(8) + rng.normal(size=200) > 0
    weights_D = rng.normal(size=8)
    for step in range(1, STEPS + 1):
        rows_B = rng.integers(0, 100, 16)
        wrong_B = labels_N[rows_B] - 1 / (1 + np.exp(-examples_ND[rows_B] @ weights_D))
        weights_D = weights_D + run.rate * wrong_B @ examples_ND[rows_B] / 16
        if run.how == "slow":
            time.sleep(0.02)
        if step == STEPS // 2 and run.rate == 0.4:
            go_wrong(run)
        report(step, STEPS)
    DONE.append(str(run.directory))
    right_N = (examples_ND @ weights_D > 0) == labels_N
    print("trained", run.rate, run.seed)
    validation = float("nan") if run.how == "nan" else float(right_N[100:150].mean())
    return {"validation": {"score": validation}, "test": {"score": float(right_N[150:].mean())},
            "process": {"pid": os.getpid(), "runs": len(DONE)}}


def go_wrong(run: LogisticRun) -> None:
    """In the middle of a run, as `how` says."""
    marker = run.directory / "died"
    if run.how == "diverges":
        raise FloatingPointError("loss is not finite\nat step 20")
    if run.how == "is killed" or (run.how == "is killed once" and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if run.how == "is taken over":
        take_over(run.directory)
    if run.how == "mistake":
        raise UserError("data.train: no such file")


def scores(tree: Path) -> dict[str, dict]:
    """{folder: the results without what depends on processes}."""
    found = {}
    for path in sorted(tree.rglob("results.json")):
        record = json.loads(path.read_text())
        record.pop("process")
        found[path.parent.name] = record
    return found


def main() -> None:
    tree, workers, rates, seeds, how, *rest = sys.argv[1:]
    runs = grid(Path(tree), [float(rate) for rate in rates.split(",")], range(int(seeds)), how)
    outcome = Sweep(runs, "sweep_runs:train", int(workers), retry_failed=bool(rest)).run()
    print(json.dumps({"finished": outcome.finished, "failed": len(outcome.failed), "ran": outcome.ran,
                      "left": outcome.left, "stopped_by": outcome.stopped_by}))


if __name__ == "__main__":
    from sweep_runs import main as main_of_the_module  # so that workers know the runs by this module's name

    main_of_the_module()
