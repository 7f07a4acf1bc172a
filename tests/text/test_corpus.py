import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text.corpus import REASONS, iter_documents, list_files, parse_line


def test_reads_each_format(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfline\r\nline\n")
    (tmp_path / "two.md").write_text("# title\n")
    lines = b'{"body": "first"}\r\n\n{"body": "second"}'
    (tmp_path / "three.jsonl").write_bytes(lines)
    with gzip.open(tmp_path / "four.jsonl.gz", "wb") as file:
        file.write(lines)
    assert [d.text for d in iter_documents(tmp_path / "one.txt")] == ["line\r\nline\n"]
    assert [d.text for d in iter_documents(tmp_path / "two.md")] == ["# title\n"]
    for name in ("three.jsonl", "four.jsonl.gz"):
        documents = list(iter_documents(tmp_path / name, "body"))
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


@given(st.lists(st.one_of(st.binary(max_size=40), st.builds(as_line, ANY_TEXT, st.booleans()))))
def test_any_bytes_are_a_text_or_a_reason(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    content = b"\n".join(lines)
    path.write_bytes(content)
    documents = list(iter_documents(path))
    assert sum(d.size for d in documents) == len(content)
    assert [d.line for d in documents] == list(range(1, len(documents) + 1))
    for document in documents:
        assert (document.text is None) != (document.reason is None)
        assert document.reason is None or document.reason in REASONS
        assert document.text is None or document.text.encode("utf-8")


def test_listing_is_sorted_deep_and_without_repeats(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", ".hidden/x.txt", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [file.path for file in list_files([tmp_path / "b/10.txt", tmp_path, f"{tmp_path}/**/*.txt"])]
    assert names == [str(tmp_path / name) for name in ("b/10.txt", "a.jsonl", "b/2.txt")]


def test_listing_refuses_by_name(tmp_path):
    (tmp_path / "data.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    for item, message in ((tmp_path / "absent", "absent: no such file"),
                          (tmp_path, "data.csv: cannot read this kind"),
                          (tmp_path / "empty", "no file in this directory"),
                          (f"{tmp_path}/*.txt", "no file matches")):
        with pytest.raises(UserError, match=message):
            list_files([item])


def test_damaged_gzip_is_refused_with_its_place(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "x"}\n' * 10)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(IntegrityError, match=r"cut\.jsonl\.gz: damaged after line \d+"):
        list(iter_documents(path))
