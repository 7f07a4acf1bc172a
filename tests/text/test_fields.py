"""Which text of a document: nested keys, several keys, conditions; the same of lines, long lines and Parquet rows."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import documents
from megatron_encdec.text.chunks import slots
from megatron_encdec.text.corpus import parse_line
from megatron_encdec.text.documents import LongDocument, read_chunk
from megatron_encdec.text.fields import Fields, leaves, listed, parser, selection
from megatron_encdec.text.inputs import list_files

RECORD = {"text": "plain", "a.b": "literal", "a": {"b": "inner", "c": {"d": "deep"}, "e.f": "dotted"}, "n": 5,
          "none": None, "blank": "  ", "title": "T", "ok": True, "tag": "3"}


def taken(keys, record=RECORD, where=(), join=" | "):
    text, data, reason = parser(selection(keys, join, where))(json.dumps(record).encode())
    assert (data or b"").decode() == (text or "")
    return reason or text


@pytest.mark.parametrize("key, found", [
    ("text", "plain"), ("a.b", "literal"), ("a.c.d", "deep"), ("a.e.f", "dotted"), ("a.x", "missing_key"),
    ("x.y", "missing_key"), ("text.y", "missing_key"), ("a", "not_text"), ("n", "not_text"), ("none", "not_text"),
    ("blank", "empty"), ("a.c", "not_text")])
def test_one_key(key, found):
    assert taken(key) == found
    assert taken([key], where=["n=5"]) == found


@pytest.mark.parametrize("keys, found", [
    (["title", "a.c.d"], "T | deep"), (["title", "none", "text"], "T | plain"), (["title", "blank"], "T"),
    (["x", "title"], "T"), (["x", "y"], "missing_key"), (["blank", "x"], "empty"), (["none", "x"], "not_text"),
    (["title", "n"], "not_text")])
def test_several_keys(keys, found):
    assert taken(keys) == found


@pytest.mark.parametrize("where, holds", [
    ("title=T", True), ("title=A|T|B", True), ("title=t", False), ("title!=T", False), ("title!=A|B", True),
    ("x=T", False), ("x!=T", True), ("n=5", True), ("n=5.0", True), ("n=6|5", True), ("n>=5", True), ("n > 5", False),
    ("n<=5", True), ("n<5.5", True), ("tag>2", True), ("title>2", False), ("x<2", False), ("ok=true", True),
    ("ok=1", False), ("none=null", True), ("a.c.d=deep", True), ("a.c.d!=deep", False), ("a=b=c", False)])
def test_conditions(where, holds):
    assert taken("text", where=[where]) == ("plain" if holds else "filtered")
    assert taken("text", where=["title=T", where]) == ("plain" if holds else "filtered")


@pytest.mark.parametrize("where, says", [
    ("language", "expected FIELD=VALUE"), ("=en", "expected FIELD=VALUE"), ("a=", "expected FIELD=VALUE"),
    ("a>b", "> compares numbers, and 'b' is none"), ("a<=nan", "compares numbers")])
def test_what_is_no_condition_is_refused(where, says):
    with pytest.raises(UserError, match=says):
        selection("text", where=[where])


def test_a_key_given_twice_or_none():
    with pytest.raises(UserError, match="--text-key a: given twice"):
        selection(["a", "b", "a"])
    with pytest.raises(UserError, match="--text-key: empty"):
        selection([""])


def test_a_plain_key_stays_the_fast_way():
    assert selection("text") == selection(["text"]) == "text"
    assert isinstance(selection("a.b"), Fields) and isinstance(selection("text", where=["a=b"]), Fields)


def test_the_keys_of_a_document_are_those_that_can_be_named():
    """Strings first; of a mapping what is inside. Each one is found."""
    assert leaves(RECORD) == ["text", "a.b", "blank", "title", "tag", "a.e.f", "a.c.d", "n", "none", "ok"]
    assert leaves({}) == [] and leaves({"a": {}, "b": [{"c": "x"}]}) == ["a", "b"]
    deep = {"text": "x"}
    for _ in range(3000):
        deep = {"k": deep}
    assert leaves(deep) == [".".join(["k"] * 3000 + ["text"])]
    assert listed([f"k{i}" for i in range(22)]).endswith("'k19' and 2 more")


VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(
    inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "a", "b"]), inner, max_size=3))


@given(st.one_of(st.binary(max_size=60), VALUES.map(lambda one: json.dumps(one).encode())))
def test_fields_of_one_plain_key_are_that_key(line):
    assert Fields(("text",)).parse(line) == parse_line(line, "text")


def test_a_long_line_is_the_same_in_pieces(tmp_path, monkeypatch):
    record = {"id": 1, "data": {"title": "ä\n" * 300, "text": 'x \\ " é' * 500}, "other": "o" * 2000, "language": "en"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record | {"language": one}) + "\n" for one in ("en", "de", "en")))
    fields = selection(["data.title", "data.text"], "--", ["language=en"])
    whole = [part for chunk in slots(list_files([path]), fields) for part in read_chunk(chunk, fields)]
    assert [text.decode() for batch in whole for text in batch.texts_D] == [
        f"{record['data']['title']}--{record['data']['text']}"] * 2
    monkeypatch.setattr(documents, "LONG", 100)
    monkeypatch.setattr(documents, "PIECE", 64)
    parts = [part for chunk in slots(list_files([path]), fields) for part in read_chunk(chunk, fields)]
    long = ["".join(part.pieces()) for part in parts if isinstance(part, LongDocument)]
    assert long == [text.decode() for batch in whole for text in batch.texts_D]
    batches = [part for part in parts if not isinstance(part, LongDocument)]
    assert [reason for batch in batches for reason, _ in batch.skipped] == ["filtered"]


def test_parquet_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"meta": {"title": f"t{i}", "raw": b"b" if i != 3 else b"\xff"}, "text": f"x{i}", "score": i}
            for i in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    fields = selection(["meta.title", "meta.raw"], " ", ["score>=2"])
    files = list_files([tmp_path / "a.parquet"])
    parts = [part for chunk in slots(files, fields) for part in read_chunk(chunk, fields)]
    assert [text.decode() for part in parts for text in part.texts_D] == ["t2 b", "t4 b", "t5 b"]
    assert [(reason, place.line) for part in parts for reason, place in part.skipped] == [
        ("filtered", 1), ("filtered", 2), ("bad_utf8", 4)]
    with pytest.raises(UserError, match="has no column 'body.text'.*there are 'text', 'meta.title', "
                                        "'meta.raw', 'score'.; name what is there with --text-key and --where"):
        list(slots(files, selection("body.text")))
    for mistyped in (["meta.txet"], ["text", "meta.title.x"]):
        with pytest.raises(UserError, match=f"has no column '{mistyped[-1]}' .there are 'text', 'meta.title'"):
            list(slots(files, selection(mistyped)))
    with pytest.raises(UserError, match="has no column 'meta.lang' .there are"):
        list(slots(files, selection("text", where=["meta.lang=en"])))
