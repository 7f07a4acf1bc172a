"""docs/evidence.md has the numbers of what was kept of the study, and nothing but the report's own code made them."""

import csv
from pathlib import Path

import evidence
import pytest

ROOT = Path(__file__).parent.parent
KEPT, PAGE = ROOT / "docs" / "evidence", ROOT / "docs" / "evidence.md"


def test_the_page_has_the_tables_of_the_kept_rows():
    made = evidence.tables(evidence.kept(KEPT))
    assert {match["name"] for match in evidence.PATTERN.finditer(PAGE.read_text())} == set(made)
    assert evidence.main([str(KEPT), "--page", str(PAGE), "--check"]) == 0


def test_another_score_is_another_page(tmp_path):
    for path in KEPT.glob("*.csv"):
        (tmp_path / path.name).write_text(path.read_text())
    rows = list(csv.reader((tmp_path / "runs.csv").read_text().splitlines()))
    place = rows[0].index("test")
    for row in rows[1:]:
        row[place] = str(float(row[place]) + 0.01 * row[0].endswith("-s1"))
    with open(tmp_path / "runs.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert evidence.main([str(tmp_path), "--page", str(PAGE), "--check"]) == 1


def test_kept_rows_are_the_same_again(tmp_path):
    numbers = evidence.kept(KEPT)
    evidence.keep(numbers, tmp_path)
    for path in KEPT.glob("*.csv"):
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name


def test_every_planned_run_is_there():
    """39 models, four tasks, two learning rates, one seed: a study that lost some would not say so here."""
    runs = evidence.kept(KEPT).runs
    places = {tuple(row[key] for key in ("model", "dataset", "rate", "seed")) for row in runs}
    assert len(places) == len(runs) == 39 * 8
    assert all(0 <= row["test"] <= 1 for row in runs)


def test_figures_are_drawn_from_them(tmp_path):
    pytest.importorskip("matplotlib")
    evidence.figures(evidence.kept(KEPT), tmp_path)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("evidence_shares.png", "evidence_recipes.png"))
