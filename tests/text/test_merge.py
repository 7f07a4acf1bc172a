"""Parts of a corpus put together: the bytes of one run, or a refusal that names what is wrong."""

import gzip
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text import chunks, indexed
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.manifest import data_fingerprint
from megatron_encdec.text.merge import merge
from megatron_encdec.text.preprocess import preprocess


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Lines, texts and a stream; chunks and shards of hashes of a few bytes."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 500)
    for module in (indexed, manifests):
        monkeypatch.setattr(module, "SHARD_SIZE", 128)
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"word {i} " * (i % 9)}) + "\n" for i in range(200)))
    for i in range(5):
        (folder / f"b{i}.txt").write_text(f"text {i} " * 40)
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": f"stream {i}"}) for i in range(90)))
    (folder / "z.txt").write_text("")
    return folder


def files(prefix):
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx")]


def check_hashes(prefix):
    """The manifest's hashes, recomputed by the grid that `parts` describes."""
    manifest = manifests.check_files(prefix)
    content, index = files(prefix)
    parts = manifest.parts or (len(content),)
    assert sum(parts) == len(content) == manifest.bin_bytes
    assert all(parts)
    hashes, position = [], 0
    for size in parts:
        hashes += [hashlib.sha256(content[start : min(start + manifest.shard_bytes, position + size)]).hexdigest()
                   for start in range(position, position + size, manifest.shard_bytes)]
        position += size
    assert tuple(hashes) == manifest.shards
    assert hashlib.sha256(index).hexdigest() == manifest.idx_sha256
    assert manifest.fingerprint == data_fingerprint(manifest.shards, manifest.idx_sha256)
    return manifest


@pytest.mark.parametrize("percent", [0, 20])
@pytest.mark.parametrize("count", [2, 3])
def test_shares_put_together_are_one_run(corpus, tokenizer_dir, tmp_path, percent, count):
    settings = {"tokenizer_path": tokenizer_dir, "workers": 1, "progress": False, "validation_percent": percent}
    whole = preprocess([corpus], output_prefix=tmp_path / "whole", **settings)
    parts = [tmp_path / f"part{i}" for i in range(1, count + 1)]
    for i, part in enumerate(parts, start=1):
        preprocess([corpus], output_prefix=part, share=(i, count), **settings)
    merged = merge(parts, tmp_path / "merged")
    for suffix in ("", ".validation") if percent else ("",):
        assert files(tmp_path / f"merged{suffix}") == files(tmp_path / f"whole{suffix}")
        check_hashes(tmp_path / f"merged{suffix}")
    for what in ("documents", "tokens", "bytes_in", "characters", "skipped", "inputs", "settings", "tokenizer", "dtype",
                 "idx_sha256", "unproven_cuts"):
        assert getattr(merged, what) == getattr(whole, what), what
    assert list(tmp_path.glob("*.partial")) == []
    again = merge(parts, tmp_path / "merged")
    assert again == merged


@pytest.mark.parametrize("percent", [0, 20])
def test_two_shares_do_not_share_an_output(corpus, tokenizer_dir, tmp_path, percent):
    settings = {"tokenizer_path": tokenizer_dir, "workers": 1, "progress": False, "validation_percent": percent}
    preprocess([corpus], output_prefix=tmp_path / "out", share=(1, 2), **settings)
    before = {path: path.read_bytes() for path in tmp_path.glob("out*")}
    with pytest.raises(UserError, match=r"out\.manifest\.json is of --shard 1/2, which --shard 2/2 would .*out-2"):
        preprocess([corpus], output_prefix=tmp_path / "out", share=(2, 2), **settings)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("out*")}
    preprocess([corpus], output_prefix=tmp_path / "out", share=(1, 3), **settings)  # cut anew: that is meant
    preprocess([corpus], output_prefix=tmp_path / "out", **settings)


def test_shares_at_once_on_one_output(corpus, tokenizer_dir, tmp_path):
    """An array whose script names one --output for all: one is done, the others are refused, whatever the order."""
    command = [sys.executable, "-m", "megatron_encdec", "preprocess", "--input", str(corpus), "--tokenizer",
               str(tokenizer_dir), "--output", str(tmp_path / "out"), "--workers", "1"]
    started = [subprocess.Popen([*command, "--shard", f"{part}/3"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                text=True) for part in (1, 2, 3)]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2, 2], said
    done = [process.returncode for process in started].index(0)
    assert manifests.check_files(tmp_path / "out").settings.share == f"{done + 1}/3"


def test_merged_outputs_of_different_inputs_and_merged_again(corpus, tokenizer_dir, tmp_path):
    for name, paths in (("x", [corpus / "a.jsonl"]), ("y", sorted(corpus.glob("b*.txt"))),
                        ("z", [corpus / "c.jsonl.gz"])):
        preprocess(paths, tokenizer_dir, tmp_path / name, workers=1, progress=False)
    merge([tmp_path / "x", tmp_path / "y"], tmp_path / "xy")
    manifest = merge([tmp_path / "xy", tmp_path / "z"], tmp_path / "xyz")
    assert check_hashes(tmp_path / "xyz") == manifest
    assert len(manifest.parts) == 3
    assert len(manifest.inputs) == 7
    assert files(tmp_path / "xyz")[0] == b"".join(files(tmp_path / name)[0] for name in "xyz")
    theirs, place = IndexedDataset(str(tmp_path / "xyz")), 0
    for name in "xyz":
        part = IndexedDataset(str(tmp_path / name))
        for i in range(len(part)):
            assert np.array_equal(part[i], theirs[place])
            place += 1
    assert len(theirs) == place == manifest.documents


def test_a_machine_may_have_nothing_to_do(tokenizer_dir, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    settings = {"tokenizer_path": tokenizer_dir, "workers": 1, "progress": False}
    preprocess([tmp_path / "a.jsonl"], output_prefix=tmp_path / "whole", **settings)
    parts = [tmp_path / f"part{i}" for i in (1, 2, 3)]
    for i, part in enumerate(parts, start=1):
        preprocess([tmp_path / "a.jsonl"], output_prefix=part, share=(i, 3), **settings)
    merge(parts, tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    assert check_hashes(tmp_path / "merged").parts == (len(files(tmp_path / "whole")[0]),)


def test_what_does_not_belong_together_is_refused_by_name(corpus, tokenizer_dir, tmp_path):
    def make(name, paths=(corpus,), **settings):
        preprocess(paths, tokenizer_dir, tmp_path / name, workers=1, progress=False, **settings)

    for i in (1, 2, 3):
        make(f"s{i}", share=(i, 3))
    make("other1", [corpus / "a.jsonl"], share=(1, 2))
    make("other2", [corpus, corpus.parent / "input" / "a.jsonl"], share=(2, 2))
    make("plain", [corpus / "a.jsonl"])
    make("ended", [corpus / "a.jsonl"], eod_token="<|reserved_1|>")
    make("split", [corpus / "a.jsonl"], validation_percent=20)
    for parts, message in ((["s1", "s3"], "these are the parts 1/3, 3/3; give all of 3 once, in order"),
                           (["s2", "s1", "s3"], "2/3, 1/3, 3/3; give all of 3"), (["s1", "s1", "s3"], "1/3, 1/3, 3/3"),
                           (["s1"], "1/3; give all of 3"), (["s1", "s2", "plain"], "1/3, 2/3, 1/1"),
                           (["other1", "other2"], "other2: is a part of other inputs than .*other1"),
                           (["plain", "ended"], "ended: tokenizer.fingerprint is .*preprocess both alike"),
                           (["plain", "split"], "split: its settings .* are not those of .*plain"),
                           (["plain", "none"], "none.*missing")):
        with pytest.raises(UserError, match=message) as error:
            merge([tmp_path / part for part in parts], tmp_path / "merged")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is a directory or one of the parts"):
        merge([tmp_path / "plain"], f"{tmp_path}/input/../plain")
    with open(tmp_path / "plain.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(IntegrityError, match=r"plain\.bin: has bytes appended"):
        merge([tmp_path / "plain"], tmp_path / "merged")
    manifests.manifest_path(tmp_path / "split").unlink()
    with pytest.raises(UserError, match="split: has no manifest"):
        merge([tmp_path / "split"], tmp_path / "merged")
    assert list(tmp_path.glob("merged*")) == []
