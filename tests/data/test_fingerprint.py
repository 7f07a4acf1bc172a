"""Data without a manifest: hashed once, kept beside it, known again."""

import json
import os
import subprocess
import sys

import pytest

from megatron_encdec.data.fingerprint import compute_record, read_record, record_path
from megatron_encdec.data.store import TokenStore
from megatron_encdec.platform.errors import IntegrityError


def test_it_is_what_a_manifest_would_say(corpus, write_manifest):
    found = TokenStore(corpus[0]).fingerprint
    assert found == write_manifest(corpus[0]).fingerprint


def test_it_is_kept_and_follows_the_data(corpus, tmp_path, write_pair):
    prefix, documents = corpus
    cache = record_path(prefix)
    first = TokenStore(prefix)
    assert "no manifest" in first.note and f"computed, now kept in {cache}" in first.note
    assert f"as kept in {cache}" in TokenStore(prefix).note
    kept = json.loads(cache.read_text())
    for damaged in ("damaged", "[]", json.dumps({**kept, "fingerprint": "other"}), json.dumps({**kept, "inputs": []})):
        cache.write_text(damaged)
        store = TokenStore(prefix)
        assert store.fingerprint == first.fingerprint and "computed" in store.note
        assert json.loads(cache.read_text()) == kept
    assert TokenStore(write_pair(tmp_path / "copy", documents)).fingerprint == first.fingerprint
    documents[0] = [token + 1 for token in documents[0]]  # same size: the time tells
    write_pair(prefix, documents)
    os.utime(prefix.with_name("corpus.bin"), ns=(1, 1))
    assert TokenStore(prefix).fingerprint != first.fingerprint


def test_a_place_that_cannot_be_written_is_said(corpus):
    record_path(corpus[0]).mkdir()
    for _ in range(2):
        assert "not kept: its directory cannot be written" in TokenStore(corpus[0]).note


def test_a_manifest_needs_no_record_and_no_note(corpus, write_manifest):
    write_manifest(corpus[0])
    assert TokenStore(corpus[0]).note is None and not record_path(corpus[0]).exists()


def test_of_many_ranks_one_hashes(corpus):
    code = "import sys; from megatron_encdec.data.store import TokenStore; print(TokenStore(sys.argv[1]).note)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(corpus[0])], stdout=subprocess.PIPE, text=True,
                              env=environment) for _ in range(4)]
    notes = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert sorted("computed" in note for note in notes) == [False, False, False, True]
    assert all("fingerprint" in note for note in notes)


def test_files_that_change_while_read_are_refused(corpus, monkeypatch):
    prefix = corpus[0]
    hash_ranges = compute_record.__globals__["hash_ranges"]

    def slowly(ranges, label):  # hashing takes a while; somebody writes in the meantime
        found = hash_ranges(ranges, label)
        os.utime(prefix.with_name("corpus.bin"), ns=(5, 5))
        return found

    monkeypatch.setitem(compute_record.__globals__, "hash_ranges", slowly)
    with pytest.raises(IntegrityError, match="corpus: its files changed while they were read"):
        TokenStore(prefix)
    assert read_record(prefix) is None
