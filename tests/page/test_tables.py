"""Tables as Markdown and CSV."""

import csv
import html
import io

import pytest
from markdown_it import MarkdownIt

from megatron_encdec.page.tables import Column, Interval, Table, as_markdown, csv_text, markdown, rate_text

TABLE = Table("t", "Title", (Column("model"), Column("SST-2", "interval", "SC"), Column("rate", "rate"),
                             Column("runs", "count")),
              [["a|b <i>", Interval(0.9110091743119266, 0.00386671, 5), 1e-05, 1234],
               ["c", Interval(0.5, None, 1), None, 1], ["d", None, 2e-4, 0]], "A note.", {(0, 1)})


def test_markdown():
    lines = markdown(TABLE).splitlines()
    assert lines[:5] == ["## Title", "", "A note.", "", "| model | SC SST-2 | rate | runs |"]
    assert lines[6] == "| a\\|b <i> | **91.1009 ± 0.3867** | 1e-5 | 1,234 |"
    assert lines[7:] == ["| c | 50.0000 | – | 1 |", "| d | – | 2e-4 | 0 |"]


def test_csv_holds_every_digit():
    rows = list(csv.DictReader(io.StringIO(csv_text(TABLE))))
    assert list(rows[0]) == ["model", "sc_sst-2", "sc_sst-2_half_width", "rate", "runs"]
    assert float(rows[0]["sc_sst-2"]) == 100 * 0.9110091743119266 and float(rows[0]["rate"]) == 1e-5
    assert rows[1]["sc_sst-2_half_width"] == "" and rows[2]["sc_sst-2"] == "" and rows[0]["runs"] == "1234"


@pytest.mark.parametrize("name", ["610m-mlm40-42k", "my_model_3", "_a_ b", "*a* **b**", "`a`", "<b>", "[a](b)", "&amp;",
                                  "a\\*b*"])
def test_names_in_markdown_stay_as_they_are(name):
    text = MarkdownIt().renderInline(as_markdown(name))
    assert html.unescape(text) == name and "<" not in text


def test_signed_differences():
    table = Table("t", "T", (Column("A − B", "signed"),), [[Interval(0.0123, 0.001, 5)], [Interval(-0.0123, 0.001, 5)]])
    assert "+1.2300 ± 0.1000" in markdown(table) and "-1.2300 ± 0.1000" in markdown(table)


def test_rates():
    assert [rate_text(rate) for rate in (1e-5, 5e-4, 2.5e-5, 0.1, 0.001)] == ["1e-5", "5e-4", "2.5e-5", "1e-1", "1e-3"]
