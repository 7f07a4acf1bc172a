"""As many rows come out of a labelled file as went in, whoever wrote it; else one line with file and line."""

import csv
import gzip
import io
import json
import re

import orjson
import pandas
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_encdec.finetune.rows import UNLABELLED, read_file
from megatron_encdec.platform.errors import IntegrityError, UserError

BOM = "\ufeff"
TEXT = st.one_of(st.text('",\t\n\r \'ab\u2028\xa0', max_size=12),
                 st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12))
ROWS = st.lists(st.fixed_dictionaries({"label": st.sampled_from(["0", "1", "no"]), "text": TEXT}), min_size=1,
                max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def rows_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return [row for _, row in read_file(path)]


def by_csv(quoting, end):
    def write(rows, delimiter):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    return write


def by_pandas(rows, delimiter):
    return pandas.DataFrame(rows, dtype=object).to_csv(sep=delimiter, index=False)


def by_pyarrow(rows, delimiter):
    out = io.BytesIO()
    pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), out, pyarrow.csv.WriteOptions(delimiter=delimiter))
    return out.getvalue().decode()


WRITERS = [by_csv(csv.QUOTE_MINIMAL, "\n"), by_csv(csv.QUOTE_MINIMAL, "\r\n"), by_csv(csv.QUOTE_ALL, "\n"),
           by_csv(csv.QUOTE_NONNUMERIC, "\r\n"), by_pandas, by_pyarrow]


@settings(deadline=None)
@given(ROWS, st.sampled_from(WRITERS), st.sampled_from(["", BOM]))
def test_csv_of_any_writer(folder, rows, write, bom):
    content = bom + write(rows, ",")
    try:
        found = rows_of(folder / "rows.csv", content)
        assert [row["label"] for row in found] == [row["label"] for row in rows]
        assert [row["text"].rstrip("\r") for row in found] == [row["text"].rstrip("\r") for row in rows]  # a line's end
    except UserError as error:  # texts whose lines look like rows
        assert re.search(r"rows.csv:\d+: the quotation mark", str(error))
        assert content.count("\n") > len(rows) + 2


@settings(deadline=None)
@given(ROWS, st.sampled_from(WRITERS), st.sampled_from(["", BOM]))
def test_tsv_of_any_csv_writer(folder, rows, write, bom):
    try:
        found = rows_of(folder / "rows.tsv", bom + write(rows, "\t"))
    except UserError as error:
        assert re.search(r"rows.tsv:\d+: .*quotation mark", str(error))
    else:
        assert [row["label"] for row in found] == [row["label"] for row in rows]
        for row, one in zip(found, rows, strict=True):
            assert row["text"].rstrip("\r") == one["text"].rstrip("\r")


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("01"), st.text(st.characters(exclude_categories=["Cs"], exclude_characters=(
    "\0\t\n\r")), max_size=12)), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_tsv_without_quoting(folder, rows, end, last):
    """A quotation mark is a character; where all are written as a CSV writer does, their fields are unquoted."""
    content = end.join(["label\ttext", *("\t".join(row) for row in rows)]) + end * last
    try:
        found = rows_of(folder / "glue.tsv", content)
    except UserError as error:  # two marks, one opening a field, one closing another, and none elsewhere
        assert re.search(r"glue.tsv:\d+: the quotation mark that opens here may be a character", str(error))
        return
    assert [row["label"] for row in found] == [label for label, _ in rows]
    assert all(row["text"] in (text, text[1:-1].replace('""', '"')) for row, (_, text) in zip(found, rows, strict=True))


@settings(deadline=None)
@given(ROWS, st.sampled_from([orjson.dumps, lambda row: json.dumps(row).encode()]), st.sampled_from([b"\n", b"\r\n"]),
       st.booleans(), st.sampled_from(["jsonl", "jsonl.gz"]))
def test_json_lines(folder, rows, dump, end, bom, suffix):
    content = BOM.encode() * bom + end.join(map(dump, rows))
    assert rows_of(folder / f"rows.{suffix}", gzip.compress(content, 1) if suffix[-1] == "z" else content) == rows


@settings(deadline=None)
@given(ROWS, st.sampled_from([pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(),
                              pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]))
def test_parquet(folder, rows, kind):
    texts = pyarrow.array([row["text"] for row in rows])
    texts = texts.dictionary_encode() if pyarrow.types.is_dictionary(kind) else texts.cast(kind)
    table = pyarrow.table({"label": [row["label"] for row in rows], "text": texts,
                           "none": pyarrow.nulls(len(rows))})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    assert [row for _, row in read_file(folder / "rows.parquet")] == [{**row, "none": None} for row in rows]


WORD = st.text(st.one_of(st.sampled_from('#"\xa0\u2028\u3000\x85\x1c'), st.characters(
    exclude_categories=["Cs"], exclude_characters="\0\t\n\r ")), min_size=1, max_size=5).filter(
        lambda word: not word.startswith("-DOCSTART-"))
SENTENCES = st.lists(st.lists(st.tuples(WORD, st.sampled_from(["O", "B-X", "I-X"])), min_size=1, max_size=4),
                     min_size=1, max_size=5)


@settings(deadline=None)
@given(SENTENCES, st.sampled_from(["\t", " ", " \t "]), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(),
       st.sampled_from(["", BOM, "-DOCSTART- O\n\n", BOM + "-DOCSTART- -X- O O\n\n", "# sent_id = 1\n"]))
def test_conll(folder, sentences, separator, end, last, head):
    content = "\n\n".join("\n".join(separator.join(pair) for pair in one) for one in sentences) + "\n" * last
    found = rows_of(folder / "rows.conll", (head + content).replace("\n", end))
    assert [list(zip(one["tokens"], one["tags"], strict=True)) for one in found] == sentences


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.csv", 'text,label\nx,1\n"never,0\ny,1\n', "a.csv:3: a quotation mark opens here and is never closed"),
    ("a.csv", 'text,label\n"a\nb",1\n"x"y,0\n', "a.csv:4: a field goes on after its closing quotation mark"),
    ("a.csv", "text,label\nx,1\n\ny\n", "a.csv:4: 1 column, but the header has 2"),
    ("a.csv", 'text,label\nx,1\n"y\nz",1,2\n', "a.csv:3: 3 columns, but the header has 2"),
    ("a.csv", "text,text\nx,1\n", "a.csv:1: two columns are called 'text'"),
    ("a.csv", "text,label\n", "a.csv: empty, there is no example"),
    ("a.csv", "", "a.csv: empty, there is no example"),
    ("a.csv", BOM, "a.csv: empty, there is no example"),
    ("a.csv", "text,label\nx,1\n\0\0\0", "a.csv:3: a NUL byte; the file is damaged, or is UTF-16"),
    ("a.csv", "text,label\nx,1\n".encode("utf-16"), "a.csv:1: the file is UTF-16 .*save it as UTF-8"),
    ("a.csv", b"text,label\nx,1\ncaf\xe9,0\n", "a.csv:3: not UTF-8 .0xe9 at byte 4 of the line"),
    ("a.tsv", "text\tlabel\nx\t1\ny\n", "a.tsv:3: 1 column, but the header has 2"),
    ("a.tsv", 'text\tlabel\n"x\ty"\t1\n"z\t0\t0\n', "a.tsv:2: 3 columns, but the header has 2; a quotation mark is"),
    ("a.tsv", 'label\ttext\n1\t"a\n0\tb"\n', "a.tsv:2: the quotation mark that opens here may be a character"),
    ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "a.jsonl:2: not valid JSON .the key 'a' is given twice"),
    ("a.jsonl", '{"a": "\\ud800"}\n', "a.jsonl:1: half of a surrogate pair"),
    ("a.jsonl", "[" * 100_000, "a.jsonl:1: nested too deep"),
    ("a.jsonl", '{"a": 1}\r\n{"a": "\0"}', "a.jsonl:2: a NUL byte"),
    ("a.conll", "a O\n\nb\n", "a.conll:3: one column, expected a word and a tag"),
    ("a.conll", "a\tX\tO\nb\tO\n", "a.conll:2: 2 columns, but the lines above have 3"),
    ("a.conll", "a\tO\nNew York B-LOC\n", "a.conll:2: one column"),
    ("a.conll", "a\tO\n\tO\n", "a.conll:2: no word in the first column"),
    ("a.conll", "a O\nb S-LOC\n", "a.conll:2: tag 'S-LOC' .*expected O, B-<type> or I-<type>"),
    ("a.conll", "-DOCSTART- O\n\n", "a.conll: empty"),
    ("a.json", "[]", "cannot read this kind of file.*JSON lines are called .jsonl"),
    ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a.csv: a Git LFS pointer"),
])
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, says):
    with pytest.raises(UserError, match=says):
        rows_of(tmp_path / name, content)


def lines_with(opening, closing, delimiter):
    texts = [f"{number % 2}{delimiter}good review {number}" for number in range(100)]
    texts[opening] = texts[opening].replace("good", '"Opened')
    if closing:
        texts[closing] += '"'
    return f"label{delimiter}text\n" + "\n".join(texts) + "\n"


@pytest.mark.parametrize("closing", [None, 60])
def test_stray_quotation_marks_swallow_no_rows(tmp_path, closing):
    """One, or two far apart: characters of a TSV; in a CSV the line where the first stands is named."""
    assert len(rows_of(tmp_path / "a.tsv", lines_with(5, closing, "\t"))) == 100
    with pytest.raises(UserError, match=r"a.csv:7: .*quotation mark"):
        rows_of(tmp_path / "a.csv", lines_with(5, closing, ","))


def test_quoted_fields_of_a_tsv_are_read_as_they_were_written(tmp_path):
    rows = [{"text": 'say "hi"', "label": "1"}, {"text": "a\ttab", "label": "0"}, {"text": "two\nlines", "label": "1"}]
    assert rows_of(tmp_path / "a.tsv", by_pandas(rows, "\t")) == rows


def test_a_long_text_in_csv(tmp_path):
    assert rows_of(tmp_path / "a.csv", f"text,label\n{'word ' * 30_000},1\n")[0]["text"] == "word " * 30_000


def test_damaged_files(tmp_path):
    with pytest.raises(IntegrityError, match="a.csv.gz: cut off after line"):
        rows_of(tmp_path / "a.csv.gz", gzip.compress(b"text,label\n" + b"xyz,1\n" * 9999)[:-20])
    with pytest.raises(UserError, match="a.parquet"):
        rows_of(tmp_path / "a.parquet", b"PAR1")
    table = pyarrow.table({"text": pyarrow.array([b"good", b"caf\xe9"])})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet: row 2: holds text that is not UTF-8"):
        read_file(tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table([[1], [2]], names=["x", "x"]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="c.parquet: two columns are called 'x'"):
        read_file(tmp_path / "c.parquet")


def test_classes_of_parquet_that_datasets_wrote(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    features = Features({"label": ClassLabel(names=["no", "yes"]), "tags": Sequence(ClassLabel(names=["O", "B-X"])),
                         "n": Value("int64")})
    rows = [{"label": 1, "tags": [0, 1], "n": 7}, {"label": -1, "tags": [], "n": -1}]
    Dataset.from_list(rows, features).to_parquet(str(tmp_path / "a.parquet"))
    assert [row for _, row in read_file(tmp_path / "a.parquet")] == [
        {"label": "yes", "tags": ["O", "B-X"], "n": 7}, {"label": UNLABELLED, "tags": [], "n": -1}]
