"""The same texts in every format, and inputs that cannot be used: through the whole of `preprocess`."""

import gzip
import json
import os
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text import preprocess as module
from megatron_encdec.text.preprocess import preprocess

TEXTS = [f"document {i} — naïve 東京 😀\nsecond line " * (i % 5 + 1) for i in range(120)]


def lines(texts, key="text", ascii_only=True):
    return "\n".join(json.dumps({"id": 1, key: text}, ensure_ascii=ascii_only) for text in texts)


def formats(folder):
    """One input for each format: {name: what to give as input}."""
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines(TEXTS))
    (folder / "b.jsonl").write_text(lines(TEXTS, ascii_only=False).replace("\n", "\r\n"))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[:50]).encode() + b"\n")
                                        + gzip.compress(lines(TEXTS[50:]).encode()))
    (folder / "d.jsonl.zst").write_bytes(pyarrow.compress(lines(TEXTS).encode(), "zstd", asbytes=True))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "e.parquet", row_group_size=7)
    (folder / "c.json.gz").write_bytes((folder / "c.jsonl.gz").read_bytes())
    (folder / "d.ndjson.zst").write_bytes((folder / "d.jsonl.zst").read_bytes())
    (folder / "e.json").write_text("\ufeff" + lines(TEXTS))
    (folder / "f").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "f" / f"{i:03}.{'txt' if i % 2 else 'md'}").write_text(text)
    (folder / "g").mkdir()
    (folder / "g" / "1.jsonl").write_text(lines(TEXTS[:20]))
    (folder / "g" / "2.txt").write_text(TEXTS[20])
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[21:60]}), folder / "g" / "3.parquet")
    (folder / "g" / "4.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[60:100]).encode()))
    (folder / "g" / "5.jsonl.zst").write_bytes(pyarrow.compress(lines(TEXTS[100:]).encode(), "zstd", asbytes=True))
    (folder / "g" / "6.csv").write_text("not read\n")
    (folder / "h").mkdir()
    (folder / "h" / "train.jsonl").write_text(lines(TEXTS))
    names = [f"{folder}/g/*", f"hf:{folder}/h", f"hf:{folder}/h::train"]
    return [[path] for path in [*sorted(folder.iterdir()), *names]]


def test_the_same_texts_give_the_same_ids_in_every_format(tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {}
    for inputs in formats(tmp_path / "input"):
        for encoder in ("gigatoken", "tokenizers") if "a.jsonl" in str(inputs) else (None,):
            manifest = preprocess(inputs, tokenizer_dir, tmp_path / f"out-{encoder}", workers=1, progress=False,
                                  encoder=encoder)
            assert (manifest.documents, manifest.skipped) == (len(TEXTS), {})
            assert manifest.characters == sum(map(len, TEXTS))
            assert manifest.encoder.name == (encoder or manifest.encoder.name)
            found[(str(inputs), encoder)] = manifest.fingerprint
    assert len(found) == 15
    assert len(set(found.values())) == 1, found


def test_hub_names(tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "named"
    for part in ("en", "fr"):
        (folder / part).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"text": f"{part} {split} {i}"} for i in range(10)] + [{"other": "x"}, {"text": None}]
            (folder / part / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {part}\n  data_files:\n  - {{split: train, path: {part}/train.jsonl}}\n"
        f"  - {{split: test, path: {part}/test.jsonl}}\n" for part in ("en", "fr")) + "---\n")

    def run(name, **settings):
        return preprocess([name], tokenizer_dir, tmp_path / "out", workers=1, progress=False, **settings)

    manifests = [run(f"hf:{folder}:{rest}") for rest in ("fr", "fr:train", "en:test")]
    assert [manifest.documents for manifest in manifests] == [10, 10, 10]
    assert manifests[0].fingerprint == manifests[1].fingerprint != manifests[2].fingerprint
    assert manifests[0].skipped["not_text"].count == 2
    assert manifests[0].skipped["not_text"].examples[0] == f"hf:{folder}:fr:11"
    for name, message in ((f"hf:{folder}:de", "de"), (f"hf:{folder}:fr:dev", "dev"), ("hf:", "hf:"),
                          ("hf:no/such-name", "no/such-name")):
        with pytest.raises(UserError, match=f"{message}.*cannot read this dataset.*check the name") as error:
            run(name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no document to write .*missing_key: 12, first hf:.*fr:1 .*; the keys there "
                                        "are 'text', 'other': name the text's with --text-key"):
        run(f"hf:{folder}:fr", text_key="body")


def test_a_dataset_with_nested_keys(tokenizer_dir, tmp_path):
    (tmp_path / "set").mkdir()
    rows = [{"id": i, "data": {"text": f"t {i}", "meta": {"lang": "en"}}} for i in range(4)]
    (tmp_path / "set/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for key in ("text", "data.txet", "data"):
        with pytest.raises(UserError, match="the keys there are 'data.text', 'data.meta.lang', 'id': name the text's"):
            preprocess([f"hf:{tmp_path / 'set'}"], tokenizer_dir, tmp_path / "out", workers=1, progress=False,
                       text_key=key)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.ndjson"])
def test_a_key_that_no_line_has(tokenizer_dir, tmp_path, name):
    content = b'\nnot json\n{"body": "x", "meta": {"text": "y"}}\n{"id": 1}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for key in ("text", "meta.body"):
        with pytest.raises(UserError, match=r"bad_json: 1, .*missing_key: 2, first .*:3 .no such key.; the keys there "
                                            "are 'body', 'meta.text': name the text's with --text-key$"):
            preprocess([tmp_path], tokenizer_dir, tmp_path / "out", workers=1, progress=False, text_key=key)


def test_a_key_that_holds_no_text_and_a_filter_that_nothing_passes(tokenizer_dir, tmp_path):
    rows = [{"meta": {"text": f"t {i}", "lang": "en"}, "score": i} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    there = "the keys there are 'meta.text', 'meta.lang', 'score': name"
    for name, key, where, message in (
            ("a.jsonl", "meta", (), f"not_text: 3.*; {there} the text's with --text-key$"),
            ("a.jsonl", "meta.text", ["lang=en"], f"filtered: 3.*; {there} what is there with --text-key and --where$"),
            ("a.parquet", "meta.text", ["meta.lang=de"], f"filtered: 3.*; {there} what is there with"),
            ("a.parquet", "score", (), "column 'score' holds int64, not text; .*there are 'meta.text', 'meta.lang'")):
        with pytest.raises(UserError, match=message):
            preprocess([tmp_path / name], tokenizer_dir, tmp_path / "out", workers=1, progress=False, text_key=key,
                       where=where)


def test_no_tokenizer_is_trained_on_nothing(tmp_path):
    """It would be used as it is by the next command, which has the right key."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"data": {"text": "some text"}}))
    settings = {"workers": 1, "progress": False, "train_tokenizer": 300}
    with pytest.raises(UserError, match=r"tok: no text to train a tokenizer on in .*a\.jsonl; the keys there are "
                                        "'data.text': name the text's with --text-key$"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "tok", tmp_path / "out", text_key="text", **settings)
    assert not (tmp_path / "tok").exists()
    preprocess([tmp_path / "a.jsonl"], tmp_path / "tok", tmp_path / "out", text_key="data.text", **settings)


def test_a_file_without_any_text(tokenizer_dir, tmp_path):
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "in" / "0.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "in" / "1.parquet")
    manifest = preprocess([tmp_path / "in"], tokenizer_dir, tmp_path / "out", workers=1, progress=False)
    assert (manifest.documents, manifest.skipped["not_text"].count) == (2, 3)


def test_stopping_at_the_first_bad_document(tokenizer_dir, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": 1}\n' + "{")
    settings = {"workers": 1, "progress": False}
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(UserError, match=rf"^{tmp_path}/b\.jsonl:2: empty: this document cannot be used"):
        preprocess(inputs, tokenizer_dir, tmp_path / "out", on_error="stop", **settings)
    assert not (tmp_path / "out.bin").exists()
    manifest = preprocess(inputs, tokenizer_dir, tmp_path / "out", **settings)
    assert sum(record.count for record in manifest.skipped.values()) == 3
    with pytest.raises(UserError, match=r"b\.jsonl:2: empty"):
        preprocess(inputs, tokenizer_dir, tmp_path / "out", on_error="stop", **settings)
    assert preprocess(inputs[:1], tokenizer_dir, tmp_path / "other", on_error="stop", **settings).documents == 3
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')  # mended: nothing finished is of use now
    assert preprocess(inputs, tokenizer_dir, tmp_path / "out", on_error="stop", workers=1).documents == 4
    assert "out.partial: 1 chunks were finished, but the input files have changed since" in capsys.readouterr().err


def test_bad_parquet_and_streams_leave_what_is_done(tokenizer_dir, tmp_path):
    settings = {"workers": 1, "progress": False}
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match=r"b\.parquet: cannot read this Parquet file"):
        preprocess([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tokenizer_dir, tmp_path / "out", **settings)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: has no column 'text'"):
        preprocess([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tokenizer_dir, tmp_path / "out", **settings)


def test_names_that_are_not_utf8_are_refused(tokenizer_dir, tmp_path):
    with open(os.fsencode(tmp_path / "in") + b"\xff.txt", "wb") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="name is not UTF-8; rename it"):
        preprocess([tmp_path], tokenizer_dir, tmp_path / "out", workers=1, progress=False)


@pytest.mark.parametrize("kind", ["grows", "vanishes", "shrinks"])
def test_inputs_that_change_while_they_are_read(tokenizer_dir, tmp_path, monkeypatch, kind):
    """The change comes when the first chunk is back, or before the workers have begun."""
    monkeypatch.setattr("megatron_encdec.text.chunks.CHUNK_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some words"}\n' * 2000)
    partial = tmp_path / "out.partial"

    def change():
        while not partial.exists():
            time.sleep(0.0005)
        if kind == "grows":
            with open(path, "a") as file:
                file.write('{"text": "late"}\n')
        elif kind == "vanishes":
            path.unlink()
        else:
            os.truncate(path, 1500)

    thread = threading.Thread(target=change)
    thread.start()
    message = {"grows": "changed while it was read", "vanishes": "No such file", "shrinks": "became shorter|changed"}
    with pytest.raises(UserError, match=rf"a\.jsonl: .*({message[kind]})") as error:
        preprocess([path], tokenizer_dir, tmp_path / "out", workers=1, progress=False)
    thread.join()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.bin").exists()
    path.write_text('{"text": "some words"}\n')
    assert preprocess([path], tokenizer_dir, tmp_path / "out", workers=1, progress=False).documents == 1
    assert not partial.exists()
    assert module.CHUNK_BYTES > 1000
