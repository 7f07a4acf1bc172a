"""A report's folder: its own files are replaced, nobody else's."""

from pathlib import Path

import pytest

from megatron_encdec.page.page import write_report
from megatron_encdec.platform.errors import UserError

FILES = {Path("tables/scores.csv"): b"1", Path("figures/a.png"): b"2", Path("report.md"): b"3",
         Path("index.html"): b"4"}


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_next_report_replaces_the_last(tmp_path):
    write_report(tmp_path / "out", {**FILES, Path("figures/b.png"): b"old"}, "--output")
    (tmp_path / "out/figures/mine.png").write_bytes(b"of no report")
    write_report(tmp_path / "out", {**FILES, Path("report.md"): b"new"}, "--output")
    found = held(tmp_path / "out")
    assert found.pop("report.json").count(b'"') == 2 * 5
    assert found == {"tables/scores.csv": b"1", "figures/a.png": b"2", "figures/mine.png": b"of no report",
                     "report.md": b"new", "index.html": b"4"}


@pytest.mark.parametrize("name", ["index.html", "report.md", "tables/scores.csv"])
def test_files_that_no_report_wrote_are_not_replaced(name, tmp_path):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"--page {tmp_path}: {name} is there, and no report wrote it"):
        write_report(tmp_path, FILES, "--page")
    assert held(tmp_path) == {name: b"mine"}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output .*file/out: cannot be written"):
        write_report(tmp_path / "file/out", FILES, "--output")
