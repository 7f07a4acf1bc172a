"""Trees of results for the tests: the paper's recorded runs, and made-up ones."""

import csv
import json
from pathlib import Path

RECORDED = Path(__file__).parent / "study" / "recorded" / "610m-clm-42k_sst2.csv"  # published runs of one cell: facts


def write_run(folder: Path, validation: float, test: float) -> None:
    """A run's results.json, as it is published."""
    folder.mkdir(parents=True)
    record = {split: {"score": score, "scores_i": [1, 0]} for split, score in (("validation", validation),
                                                                              ("test", test))}
    (folder / "results.json").write_text(json.dumps(record))


def write_recorded(tree: Path) -> None:
    """The 30 recorded runs of 610m-clm-42k on SST-2."""
    for row in csv.DictReader(RECORDED.read_text().splitlines()):
        write_run(tree / f"610m-clm-42k/SC/sst2/lr{row['lr']}_sd{row['seed']}", float(row["validation"]),
                  float(row["test"]))


def write_grid(tree: Path, cell: str, scores: dict[float, list[float]], train_set: str = "") -> None:
    """Runs of `<model>/<family>/<dataset>`: {learning rate: test score of seed 0, 1, ...}; validation is 0.01 less."""
    for rate, row in scores.items():
        for seed, test in enumerate(row):
            write_run(tree / cell / f"{train_set}lr{rate:g}_sd{seed}", test - 0.01, test)
