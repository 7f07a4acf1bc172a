"""The page: what is shown, what is folded away, and that nothing which others wrote becomes HTML."""

from megatron_encdec.page.page import FOLDED_ROWS, Fact, Section, page
from megatron_encdec.page.tables import Column, Interval, Table


def table(rows: int = 2, **more) -> Table:
    values = [["a|b <i>", Interval(0.9110091743119266, 0.00386671, 5)], ["c ± d", None]]
    return Table("t", "Title", (Column("model <m>"), Column("SST-2", "interval", "SC & co")),
                 (values * rows)[:rows], **more)


def test_cells():
    text = page("T", "", [], [Section("s", "S", tables=[table(best={(0, 1)}, incomplete={(0, 1)}, aside={1})])], "")
    assert '<td class="n best" title="91.1009 ± 0.3867">91.10<small> ± 0.39</small> †</td>' in text
    assert '<td class="t">c ± d</td>' in text and '<td class="n">–</td>' in text
    assert text.count('<tr class="aside">') == 1
    assert '<th class="g" colspan="1">SC &amp; co</th>' in text and "model &lt;m&gt;" in text


def test_nothing_that_others_wrote_is_html_or_fetched():
    said = '<b onclick="x">b</b> <script>s</script> ![i](http://y/i.png) [a](javascript:x) <http://z>'
    sections = [Section("s", said, said, tables=[table(note=said)], details=[table(note=said)])]
    text = page(said, said, [Fact(1, said)], sections, said)
    body = text.partition("</style>")[2]
    assert not any(tag in text for tag in ("<b onclick", "<script", "<i>")) and "<img" not in text
    assert "http" not in body.replace("http://y/i.png", "").replace("http://z", "")
    assert 'href="http' not in text and 'href="javascript' not in text


def test_texts_of_ours_are_markdown():
    text = page("T", "", [], [Section("s", "S", "One *word*.\n\nTwo.", [table(note="`code` & more")])], "Last.")
    assert "<p>One <em>word</em>.</p>" in text and "<p>Two.</p>" in text and "<code>code</code> &amp; more" in text


def test_long_tables_are_folded_but_the_first():
    long = FOLDED_ROWS + 1
    sections = [Section("a", "A", tables=[table(long), table(long)]), Section("b", "B", tables=[table(long), table(1)]),
                Section("c", "C", details=[table(1)]), Section("none", "Nothing")]
    text = page("T", "", [Fact(1234, "runs"), Fact(2, "failed", is_warning=True)], sections, "")
    assert text.count("<table>") == 5 and text.count("<details>") == 3
    assert text.count(f"Title ({long} rows)") == 2 and text.count("Title (1 row)") == 1
    assert 'id="none"' not in text and 'href="#none"' not in text
    assert '<div class="fact"><b>1,234</b><span>runs</span>' in text and '<div class="fact warn"><b>2</b>' in text
