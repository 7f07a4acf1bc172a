import gzip
import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest
from corpora import texts_of

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text import chunks
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.encode import is_validation
from megatron_encdec.text.preprocess import preprocess
from megatron_encdec.text.tokenizer import load_tokenizer


def read_documents(prefix):
    """The ids of each document in `prefix`, without the end of document, read by the format's definition."""
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    lengths = np.frombuffer(index, "<i4", count, 34)
    ids = np.fromfile(prefix.with_name(prefix.name + ".bin"), "<u2")
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    assert all(document[-1] == 0 for document in documents)
    return [document[:-1].tolist() for document in documents]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(directory, pattern="out*"):
    return {path.name: path.read_bytes() for path in directory.glob(pattern) if path.is_file()}


def test_every_document_is_in_the_output_or_counted(mixed_corpus, tokenizer_dir, tmp_path):
    corpus, good, bad = mixed_corpus
    manifest = preprocess([corpus], tokenizer_dir, tmp_path / "out", workers=1, progress=False)
    assert manifest.documents == good
    assert {reason: skipped.count for reason, skipped in manifest.skipped.items()} == bad
    assert manifest.skipped["missing_key"].examples == (f"{corpus}/a.jsonl:155",)
    assert manifest.skipped["utf16"].examples == (f"{corpus}/d.txt:1",)
    assert manifest.bytes_in == sum(path.stat().st_size for path in corpus.iterdir())
    texts = [text for path in sorted(corpus.iterdir()) for text in texts_of(path)]
    tokenizer = load_tokenizer(tokenizer_dir)
    assert [tokenizer.decode(ids) for ids in read_documents(tmp_path / "out")] == texts
    assert manifest.characters == sum(map(len, texts))
    assert manifest.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert manifests.check_files(tmp_path / "out") == manifest


def test_output_does_not_depend_on_the_number_of_workers(mixed_corpus, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        preprocess([mixed_corpus[0]], tokenizer_dir, tmp_path / str(workers) / "out", workers=workers,
                   validation_percent=20, progress=False)
    assert len(contents(tmp_path / "1")) == 6
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_validation_split_stays_when_data_is_added(tokenizer_dir, tmp_path):
    texts = [f"document {i}" for i in range(400)]
    decode = load_tokenizer(tokenizer_dir).decode
    chosen = []
    for number in (200, 400):  # reversed: the added documents come first, the old ones move down
        path = write_lines(tmp_path / "data.jsonl", texts[:number][::-1])
        prefix = tmp_path / f"out{number}"
        manifest = preprocess([path], tokenizer_dir, prefix, workers=1, validation_percent=10, progress=False)
        validation = [decode(ids) for ids in read_documents(tmp_path / f"out{number}.validation")]
        train = [decode(ids) for ids in read_documents(prefix)]
        assert sorted(validation + train) == sorted(texts[:number])
        beside = manifests.read(f"{prefix}.validation")
        assert manifest.bytes_in + beside.bytes_in == path.stat().st_size
        assert (manifest.settings.split, beside.settings.split) == ("train", "validation")
        chosen.append(validation)
    assert set(chosen[1]) & set(texts[:200]) == set(chosen[0])
    assert 20 <= len(chosen[1]) <= 60
    draws = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.1 for text in texts]
    assert [is_validation(hashlib.sha256(text.encode()).digest(), 10.0) for text in texts] == draws


def test_second_run_does_nothing_and_a_changed_one_does(tokenizer_dir, tmp_path, capsys):
    path = write_lines(tmp_path / "data.jsonl", ["one", "two", "three"])

    def run(**changed):
        settings = {"mask_token": None} | changed
        manifest = preprocess([path], tokenizer_dir, tmp_path / "out", workers=1, **settings)
        written = (tmp_path / "out.bin").stat()
        return manifest, (written.st_ino, written.st_mtime_ns), "nothing to do" in capsys.readouterr().err

    first, stamp, idle = run()
    assert not idle
    assert run() == (first, stamp, True)
    assert not run(eod_token="<|reserved_1|>")[2]
    first, stamp, _ = run()
    masked, *same = run(mask_token="<|reserved_1|>")  # the same ids: recorded, nothing encoded again
    assert (masked.tokenizer.mask_id, same) == (4, [stamp, True])
    assert manifests.read(tmp_path / "out") == masked
    with open(path, "a") as file:
        file.write('{"text": "four"}\n')
    changed, _, idle = run()
    assert (changed.documents, idle) == (4, False)
    (tmp_path / "out.bin").write_bytes(b"")
    assert not run()[2]
    assert manifests.check_files(tmp_path / "out") == changed


def test_data_of_earlier_versions_is_complete_and_gets_the_tokenizers_fingerprint_of_today(tokenizer_dir, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one text", "another"])
    arguments = {"inputs": [path], "output_prefix": tmp_path / "out", "workers": 1, "progress": False}
    manifest = preprocess(tokenizer_path=tokenizer_dir, **arguments)
    tokenizer, file = load_tokenizer(tokenizer_dir), tmp_path / "out.manifest.json"
    file.write_text(file.read_text().replace(manifest.tokenizer.fingerprint, tokenizer.file_sha256))
    stamp = (tmp_path / "out.bin").stat().st_mtime_ns
    preprocess(tokenizer_path=tokenizer_dir, **arguments)
    assert manifests.read(tmp_path / "out") == manifest
    assert (tmp_path / "out.bin").stat().st_mtime_ns == stamp


def test_failed_run_leaves_the_older_output(tokenizer_dir, tmp_path):
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "some text"}\n' * 5)
    preprocess([path], tokenizer_dir, tmp_path / "out", workers=1, progress=False)
    before = contents(tmp_path, "*out*")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"data\.jsonl\.gz: cut off"):
        preprocess([path], tokenizer_dir, tmp_path / "out", workers=1, progress=False)
    assert contents(tmp_path, "*out*") == before


def test_trains_the_tokenizer_once(tmp_path, capsys):
    path = write_lines(tmp_path / "data.jsonl", [f"the words of document {i}" for i in range(50)])
    arguments = {"inputs": [path], "tokenizer_path": tmp_path / "tok", "output_prefix": tmp_path / "out",
                 "workers": 1}
    manifest = preprocess(**arguments, train_tokenizer=280)
    assert manifest.tokenizer.vocabulary_size == 280
    assert "trained a byte-level BPE of 280 entries" in capsys.readouterr().err
    stamp = (tmp_path / "tok" / "tokenizer.json").stat().st_mtime_ns
    assert preprocess(**arguments, train_tokenizer=290) == manifest
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "tok" / "tokenizer.json").stat().st_mtime_ns == stamp


def test_relocated_inputs_give_the_same_fingerprint(tokenizer_dir, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", ["one", "two"])
    shutil.copy(path, tmp_path / "copy.jsonl")
    os.utime(tmp_path / "copy.jsonl", (time.time() - 99, time.time() - 99))
    first = preprocess([path], tokenizer_dir, tmp_path / "out", workers=1, progress=False)
    copied = [tmp_path / "copy.jsonl"]
    second = preprocess(copied, tokenizer_dir, tmp_path / "out2", workers=1, progress=False)
    assert first.fingerprint == second.fingerprint
    assert first.inputs != second.inputs


@pytest.mark.parametrize(("texts", "settings", "message"), [
    ([" ", ""], {}, r"no document to write .*empty: 2, first .*data\.jsonl:1"),
    (["one"], {"validation_percent": 1e-9}, "none of 1 documents fell into the validation split"),
    (["one"], {"validation_percent": 100}, "validation-percent 100: from 0 to below 100"),
    (["one"], {"workers": 0}, "workers 0: at least 1"),
    (["one"], {"output_prefix": "."}, "is a directory; give a prefix"),
    (["one"], {"tokenizer_path": "absent"}, "absent: no tokenizer here"),
    (["one"], {"tokenizer_path": "new.json", "train_tokenizer": 300}, "trained into a directory"),
])
def test_mistakes_get_one_line(tokenizer_dir, tmp_path, texts, settings, message):
    path = write_lines(tmp_path / "data.jsonl", texts)
    arguments = {"tokenizer_path": tokenizer_dir, "output_prefix": tmp_path / "out", "workers": 1,
                 "progress": False}
    with pytest.raises(UserError, match=message) as error:
        preprocess([path], **arguments | settings)
    assert "\n" not in str(error.value)
    assert list(tmp_path.glob("*out*")) == []
