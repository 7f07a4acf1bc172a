import gzip
import json

import pytest
from corpora import documents_of, texts_of
from hypothesis import given
from hypothesis import strategies as st

from megatron_encdec.text.corpus import REASONS, parse_line, parse_text


def test_reads_each_format(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfline\r\nline\n")
    (tmp_path / "two.md").write_text("# title\n")
    lines = b'{"body": "first"}\r\n\n{"body": "second"}'
    (tmp_path / "three.jsonl").write_bytes(lines)
    with gzip.open(tmp_path / "four.jsonl.gz", "wb") as file:
        file.write(lines)
    assert texts_of(tmp_path / "one.txt") == ["line\r\nline\n"]
    assert texts_of(tmp_path / "two.md") == ["# title\n"]
    for name in ("three.jsonl", "four.jsonl.gz"):
        documents = documents_of(tmp_path / name, "body")
        assert [(d.line, d.text, d.reason) for d in documents] == [
            (1, "first", None), (2, None, "empty"), (3, "second", None)]
        assert sum(d.size for d in documents) == len(lines)


@pytest.mark.parametrize(("line", "reason"), [
    (b"", "empty"), (b" \t\r\n", "empty"), (b'{"text": "\\n "}', "empty"), (b"{", "bad_json"),
    (b'"text"', "bad_json"), (b"[" * 100_000, "bad_json"), (b'{"text": %s}' % (b"9" * 5000), "bad_json"),
    (b'{"Text": "x"}', "missing_key"), (b'{"text": ["x"]}', "not_text"), (b'{"text": "\xc3("}', "bad_utf8"),
    (b'{"text": "\\udc00"}', "bad_utf8")])
def test_bad_line_has_its_reason(line, reason):
    assert parse_line(line, "text") == (None, None, reason)


def as_line(text, ascii_only):
    return json.dumps({"text": text}, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # half surrogate pairs too


@given(st.one_of(st.binary(max_size=40), st.builds(as_line, ANY_TEXT, st.booleans())))
def test_any_bytes_are_a_text_or_a_reason(line):
    text, data, reason = parse_line(line, "text")
    assert (text is None) == (data is None) != (reason is None)
    assert reason is None or reason in REASONS
    assert text is None or text.encode("utf-8") == data


@pytest.mark.parametrize(("data", "reason"), [
    ("naïve".encode("utf-16"), "utf16"), ("naïve".encode("utf-32"), "utf16"), ("word".encode("utf-16-be") * 2, "utf16"),
    ("some words".encode("utf-16-le"), "utf16"), (b"\xff\xfe", "utf16"), ("naïve".encode("latin-1"), "bad_utf8"),
    (b"\0" * 4096, "empty"), (b"\0\0\n", "empty")])
def test_text_that_is_none_has_its_reason(data, reason):
    assert parse_text(data) == (None, None, reason)


def test_zeros_in_a_text_are_text():
    for data in (b"\0a", b"a\0b\0c", b"a\0"):
        assert parse_text(data) == (data.decode(), data, None)
