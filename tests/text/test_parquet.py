"""Parquet files of every make, and those that cannot be used."""

import pyarrow
import pyarrow.parquet
import pytest
from corpora import documents_of

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text import documents, parquet
from megatron_encdec.text.chunks import slots
from megatron_encdec.text.documents import LongDocument, read_chunk
from megatron_encdec.text.inputs import list_files
from megatron_encdec.text.parquet import iter_rows, row_groups

TEXTS = ["one", None, "naïve — 東京", "", "x" * 3000, "one", None]


def write(path, texts, kind=None, groups=3, **columns):
    column = pyarrow.array(texts, pyarrow.string() if kind is None else kind)
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": column} | columns), path,
                                row_group_size=groups)
    return str(path)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary(),
                                  pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.string_view(),
                                  pyarrow.binary_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string())])
def test_every_kind_of_text_column(tmp_path, kind, monkeypatch):
    values = [value.encode() if value and "binary" in str(kind) else value for value in TEXTS]
    values = [b"" if value == "" and "binary" in str(kind) else value for value in values]
    path = write(tmp_path / "a.parquet", values, kind)
    expected = [None if text is None else text.encode() for text in TEXTS]
    assert row_groups(path, "text") == 3
    assert list(iter_rows(path, "text")) == expected
    assert [list(iter_rows(path, "text", [group])) for group in range(3)] == [expected[:3], expected[3:6], expected[6:]]
    monkeypatch.setattr(parquet, "BYTES_AT_ONCE", 100)  # rows of their own, as views
    assert [row if row is None else bytes(row) for row in iter_rows(path, "text")] == expected
    assert [(d.line, d.text, d.reason) for d in documents_of(path)] == [
        (1, "one", None), (2, None, "not_text"), (3, "naïve — 東京", None), (4, None, "empty"),
        (5, "x" * 3000, None), (6, "one", None), (7, None, "not_text")]


@pytest.mark.parametrize(("long", "held"), [(1 << 20, 1 << 20), (10, 1 << 20), (1 << 20, 1)])
def test_rows_of_a_chunk(tmp_path, monkeypatch, long, held):
    """Bad UTF-8 and a byte order mark are treated alike in short rows and in long ones."""
    monkeypatch.setattr(documents, "LONG", long)
    monkeypatch.setattr(documents, "PIECE", 8)
    monkeypatch.setattr(documents, "BYTES_IN_BATCH", held)
    rows = [b"\xef\xbb\xbfmarked " + b"w" * 30, b"caf\xc3" + b"x" * 30, None, b" " * 30, "né".encode() * 30,
            b"\xe6" * 20]
    path = write(tmp_path / "a.parquet", rows, pyarrow.binary(), groups=100)
    (chunk,) = slots(list_files([path]), "text")
    texts, skipped = [], []
    for part in read_chunk(chunk, "text"):
        if isinstance(part, LongDocument):
            texts.append((part.place.line, "".join(part.pieces())))
        else:
            texts += [(line, text.decode()) for (_, line, _), text in zip(part.places_D, part.texts_D, strict=True)]
            skipped += part.skipped
    assert texts == [(1, "marked " + "w" * 30), (5, "né" * 30)]
    assert sorted(skipped) == [("bad_utf8", (0, 2, 34)), ("bad_utf8", (0, 6, 20)), ("empty", (0, 4, 30)),
                               ("not_text", (0, 3, 0))]


def test_files_that_cannot_be_used_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(UserError, match=r"a\.parquet: has no column 'body' \(there are 'text', 'id'\).*--text-key"):
        row_groups(path, "body")
    with pytest.raises(UserError, match=r"column 'id' holds int64, not text.*\(there are 'text', 'id'\)"):
        row_groups(path, "id")
    with pytest.raises(UserError, match=r"none\.parquet: cannot read the input: No such file") as error:
        row_groups(str(tmp_path / "none.parquet"), "text")
    assert not isinstance(error.value, IntegrityError)
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (whole[:-20], whole[:50], b"", b"PAR1" + b"\0" * 100 + b"PAR1"):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"a\.parquet: cannot read this Parquet file") as error:
            row_groups(path, "text")
        assert "\n" not in str(error.value)


def test_damage_inside_is_noticed(tmp_path):
    path = write(tmp_path / "a.parquet", [f"text {i}" * 50 for i in range(500)], groups=500)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff" * 400
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"a\.parquet: cannot read"):
        list(iter_rows(path, "text"))


@pytest.mark.parametrize("nothing", [pyarrow.nulls(3), pyarrow.array([None] * 3, pyarrow.string_view()),
                                     pyarrow.array([None] * 3).cast(pyarrow.string()).dictionary_encode()])
def test_a_column_without_any_text_is_counted(tmp_path, nothing):
    pyarrow.parquet.write_table(pyarrow.table({"text": nothing}), tmp_path / "a.parquet")
    assert [d.reason for d in documents_of(tmp_path / "a.parquet")] == ["not_text"] * 3


@pytest.mark.parametrize(("column", "kind"), [
    ([["a"]], "list<"), ([{"b": "a"}], "struct<b: string>"), ([1.5], "double"), ([True], "bool"),
    (pyarrow.array([b"abc"], pyarrow.binary(3)), "fixed_size_binary")])
def test_columns_that_hold_no_text_are_refused(tmp_path, column, kind):
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "other": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: column 'text' holds {kind}.*, not text; .*there are '.*'other'"):
        row_groups(str(tmp_path / "a.parquet"), "text")


def test_names_with_dots_and_names_given_twice(tmp_path):
    path = str(tmp_path / "a.parquet")
    nested = pyarrow.array([{"text": "inside"}])
    pyarrow.parquet.write_table(pyarrow.table({"meta": nested, "meta.text": ["own"]}), path)
    assert list(iter_rows(path, "meta.text")) == [b"own"]
    pyarrow.parquet.write_table(pyarrow.table({"meta": nested}), path)
    with pytest.raises(UserError, match=r"no column 'meta.text' \(there are 'meta.text'"):
        row_groups(path, "meta.text")
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"a\.parquet: has 2 columns 'text'; rename"):
        row_groups(path, "text")


def test_encrypted_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, ["x"] * 9)
    path.write_bytes(path.read_bytes()[:-4] + b"PARE")
    with pytest.raises(UserError, match=r"a\.parquet: is encrypted \(.*write it again without") as error:
        row_groups(str(path), "text")
    assert not isinstance(error.value, IntegrityError)
