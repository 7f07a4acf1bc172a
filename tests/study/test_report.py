"""`study report` as users call it: the acceptance number, every file, a page that needs no network."""

import base64
import contextlib
import csv
import hashlib
import io
import json
import re
import struct
from html.parser import HTMLParser

import pytest
from result_trees import write_grid, write_recorded

from megatron_encdec.cli import main
from megatron_encdec.study.analysis import analyse
from megatron_encdec.study.content import all_tables
from megatron_encdec.study.figures import all_figures
from megatron_encdec.study.report import report
from megatron_encdec.study.results import read_trees


def write_four_families(tree):
    """Three models on five datasets, with baselines, a failed run and a missing one."""
    grid = {1e-5: 0.0, 1e-4: 0.05, 5e-4: -0.1}
    for place, model in enumerate(("610m-mlm40-42k", "610m-clm-10k-mlm40-42k", "610m-clm-42k")):
        for number, cell in enumerate(("SC/library", "SC/reviews", "TC/code", "QA/spans")):
            write_grid(tree, f"{model}/{cell}", {rate: [0.6 + 0.03 * place + 0.02 * number + drop + 0.003 * seed
                                                        for seed in range(3)] for rate, drop in grid.items()})
        write_grid(tree, f"{model}/IR/summaries", {1e-5: [0.5, 0.6, 0.55]}, train_set="pairs_")
    broken = tree / "610m-clm-42k/SC/library/lr0.0001_sd2"
    (broken / "results.json").unlink()
    (broken / "failure.json").write_text('{"reason": "loss is not finite at step 7 <of 10>"}')
    (tree / "610m-clm-42k/TC/code/lr0.0001_sd2/results.json").unlink()
    (tree / "baselines/SC").mkdir(parents=True)
    (tree / "baselines/SC/library.json").write_text(json.dumps({"metric": "accuracy", "baselines": {
        "majority": {"test": {"score": 0.21}}, "naive_bayes": {"test": {"score": 0.58}}}}))


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


class Page(HTMLParser):
    """Collects tags, checks that they close, and finds anything that a browser would fetch."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.ids, self.targets, self.tables = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += int(attributes.get("colspan", 1))
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("src", "href", "data", "srcset"):
            if name in attributes:
                (self.targets if attributes[name].startswith("#") else self.sources).append(attributes[name])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_acceptance(tmp_path, capsys):
    """The paper's recorded runs give its printed number, in every form of output."""
    write_recorded(tmp_path / "tree")
    assert main(["study", "report", str(tmp_path / "tree"), "--output", str(tmp_path / "out")]) == 0
    assert "91.1009 ± 0.3867" in capsys.readouterr().out
    assert "| 91.1009 ± 0.3867 |" in (tmp_path / "out/report.md").read_text()
    page = (tmp_path / "out/index.html").read_text()
    assert 'title="91.1009 ± 0.3867">91.10<small> ± 0.39</small>' in page
    assert all(f"<b>{count}</b><span>{name}</span>" in page
               for count, name in ((1, "model"), (1, "dataset"), (30, "runs finished"), (0, "runs failed")))
    row = rows_of(tmp_path / "out/tables/scores.csv")[0]
    assert (round(float(row["test"]), 4), round(float(row["test_half_width"]), 4)) == (91.1009, 0.3867)
    assert row["learning_rates_selected"] == "5e-5 × 4, 1e-4 × 1" and row["runs"] == "30 of 30"
    assert float(row["published"]) == pytest.approx(91.10)
    # by hand from the 30 rows: best minus worst of each seed is 8.0275, 9.7477, 9.4037, 10.4358, 10.3211
    spread = rows_of(tmp_path / "out/tables/sensitivity.csv")[0]
    assert float(spread["spread"]) == pytest.approx(9.5872, abs=1e-4) and spread["seeds"] == "5"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(folder of the report on four families, what was said)."""
    root = tmp_path_factory.mktemp("full")
    write_four_families(root / "tree")
    (root / "out/figures").mkdir(parents=True)
    (root / "out/figures/scores_XX.png").write_bytes(b"of an earlier report")
    (root / "out/report.json").write_text('{"files": ["figures/scores_XX.png"]}')
    with contextlib.redirect_stdout(io.StringIO()) as said:
        report([root / "tree"], root / "out")
    return root / "out", said.getvalue()


def test_every_file_of_a_full_report(full):
    out, _ = full
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {*(f"scores_{family}" for family in ("SC", "TC", "QA", "IR")),
                       *(f"differences_{family}" for family in ("SC", "TC", "QA", "IR")),
                       *(f"learning_rates_{family}" for family in ("SC", "TC", "QA")),
                       *(f"shares_{family}" for family in ("SC", "TC", "QA", "IR"))}
    for path in (out / "figures").iterdir():
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 800 and height > 300
    assert {path.stem for path in (out / "tables").iterdir()} == {
        "overview", "scores", "comparisons", "sensitivity", "rates", "seeds", "problems"}
    text = (out / "report.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (out / link).is_file()


def test_failures_are_said_and_not_averaged_away(full):
    out, said = full
    assert "failed: 610m-clm-42k/SC/library lr0.0001_sd2: loss is not finite at step 7 <of 10>" in said
    assert "missing: 610m-clm-42k/TC/code: 1 of 9 runs are not there: lr0.0001_sd2" in said
    row = next(row for row in rows_of(out / "tables/scores.csv") if row["model"] == "610m-clm-42k"
               and row["dataset"] == "library")
    assert (row["runs"], row["failed"], row["missing"]) == ("8 of 9", "1", "0")
    assert row["baselines"] == "majority 21.00; naive bayes 58.00"
    found = next(row for row in rows_of(out / "tables/sensitivity.csv") if row["model"] == "610m-clm-42k"
                 and row["dataset"] == "library")
    assert found["seeds"] == "2" and found["failed_runs"] == "1"
    page = (out / "index.html").read_text()
    overview = (out / "report.md").read_text()
    assert "| 610m-clm-42k | **69.6333 ± 2.9775 †** |" in overview and "†: some of its runs" in overview
    assert "loss is not finite at step 7 &lt;of 10&gt;" in page and "majority (baseline)" in page


def test_the_page_stands_alone(full):
    text = (full[0] / "index.html").read_text()
    page = Page(text)
    assert not page.open
    assert page.sources and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    for source in page.sources:
        drawing = base64.b64decode(source.partition(",")[2]).decode()
        assert drawing.rstrip().endswith("</svg>") and not re.search(r'xlink:href="(?!#)', drawing)
    assert {target[1:] for target in page.targets} == set(page.ids)
    assert all(len(set(rows)) == 1 for rows in page.tables)  # every row of a table has as many cells
    assert not re.search(r"<(script|link|iframe)|url\(|@import", text)


def test_the_same_results_give_the_same_bytes(tmp_path):
    write_grid(tmp_path / "tree", "a/SC/x", {1e-5: [0.5, 0.6], 1e-4: [0.7, 0.8]})
    prints = []
    for name in ("one", "two"):
        report([tmp_path / "tree"], tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        prints.append([(path.relative_to(tmp_path / name), hashlib.sha256(path.read_bytes()).hexdigest())
                       for path in files])
    assert prints[0] == prints[1]


def test_reference_and_many_models(tmp_path):
    for model in range(14):
        write_grid(tmp_path / "tree", f"m-{model}k/SC/sst2", {1e-5: [0.5 + 0.02 * model, 0.51 + 0.02 * model],
                                                             1e-4: [0.5, 0.5]})
    results = read_trees([tmp_path / "tree"])
    found = analyse(results)
    assert {picture.name for picture in all_figures(found)} == {
        "scores_SC", "learning_rates_SC", "checkpoints_SC"}  # no differences: 91 pairs stand in the CSV alone
    assert len(all_tables(found)["comparisons"].rows) == 91
    found = analyse(results, reference="m-3k")
    table = all_tables(found)["comparisons"]
    place = [column.name for column in table.columns].index("model B")
    assert len(table.rows) == 13 and {row[place] for row in table.rows} == {"m-3k"}
    assert "differences_SC" in {picture.name for picture in all_figures(found)}


@pytest.mark.parametrize("options", [["absent"], ["tree", "--reference", "nobody"], ["empty"]])
def test_mistakes_are_one_line(tmp_path, options, capsys):
    write_grid(tmp_path / "tree", "a/SC/x", {1e-5: [0.5]})
    (tmp_path / "empty").mkdir()
    assert main(["study", "report", str(tmp_path / options[0]), *options[1:], "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and options[-1] in said and not (tmp_path / "out").exists()
