import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from corpora import write_tokens
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_encdec.data.store import TokenStore
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.text.manifest import TokenizerRecord


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("sequences_each", [1, 3])
def test_reads_what_was_written(tmp_path, write_pair, dtype, sequences_each):
    documents = [[1, 2, 3], [], [4], [], [65535, 6, 7, 8]]
    store = TokenStore(write_pair(tmp_path / "c.v2", documents, dtype, sequences_each))
    assert (store.tokens, store.documents, store.dtype, store.tokenizer) == (8, 5, np.dtype(dtype), None)
    tokens = store.read(0, 8)
    assert tokens.dtype == np.int64 and tokens.tolist() == [1, 2, 3, 4, 65535, 6, 7, 8]
    assert store.read(3, 2).tolist() == [4, 65535]
    assert store.document_ends(0, 8).tolist() == [3, 4, 8]
    for start, count in [(-1, 2), (7, 2), (0, 9)]:
        with pytest.raises(IndexError):
            store.read(start, count)


def test_document_ends_equal_brute_force(corpus):
    prefix, documents = corpus
    store = TokenStore(prefix)
    last_of_document = np.cumsum([len(document) for document in documents if document])
    assert store.tokens == last_of_document[-1]
    for start in range(0, store.tokens, 7):
        for count in (1, 2, 30, 200):
            expected = [end - start for end in last_of_document if start < end <= start + count]
            assert store.document_ends(start, count).tolist() == expected


def test_an_empty_pair_opens(tmp_path, write_pair):
    for documents in ([], [[], []]):
        store = TokenStore(write_pair(tmp_path / "e", documents))
        assert (store.tokens, store.documents) == (0, len(documents))
        assert store.document_ends(0, 0).tolist() == []


def test_opening_reads_no_index_into_memory(tmp_path, write_pair, write_manifest):
    prefix = write_pair(tmp_path / "long", [[1]] * 40_000)
    write_manifest(prefix)
    tracemalloc.start()
    try:
        store = TokenStore(prefix)
        store.document_ends(30_000, 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000  # the .idx has 800 kB


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("change", [-1, -2, +2, "empty", "missing"])
def test_damage_is_refused_by_name_and_bytes(corpus, suffix, change):
    prefix, _ = corpus
    path = prefix.with_name(f"corpus.{suffix}")
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes({-1: data[:-1], -2: data[:-2], 2: data + b"xx", "empty": b""}[change])
    with pytest.raises(IntegrityError) as caught:
        TokenStore(prefix)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    if change != "missing":
        assert f"found {path.stat().st_size:,}" in message
        assert f"expected {34 if (suffix, change) == ('idx', 'empty') else len(data):,} bytes" in message


@pytest.mark.parametrize("at, value, message", [
    (0, b"X", "not a Megatron index"), (9, b"\x02", "version 2"), (17, b"\x63", "dtype code 99"),
    (-8, b"\x01", "document indices do not run"), (-1, b"\xff", "document indices do not run"),
])
def test_a_foreign_idx_is_refused(corpus, at, value, message):
    prefix, _ = corpus
    path = prefix.with_name("corpus.idx")
    data = bytearray(path.read_bytes())
    data[at % len(data)] = value[0]
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=message):
        TokenStore(prefix)


def test_manifest_gives_fingerprint_and_tokenizer(corpus, write_manifest):
    prefix, documents = corpus
    manifest = write_manifest(prefix)
    store = TokenStore(prefix)
    assert store.fingerprint == manifest.fingerprint
    assert store.tokenizer == TokenizerRecord("t", 60000, 0, None)
    assert not prefix.with_name("corpus.fingerprint.json").exists()
    path = prefix.with_name("corpus.manifest.json")
    path.write_text(path.read_text().replace(f'"documents": {len(documents)}', '"documents": 3'))
    with pytest.raises(IntegrityError, match="corpus.idx: has 60 documents, .*corpus.manifest.json says 3"):
        TokenStore(prefix)


def test_reads_what_preprocess_writes(tmp_path):
    write_tokens(tmp_path / "w", [[0, 1, 2, 3], [], [4, 5, 6]], np.int32)
    store = TokenStore(tmp_path / "w")
    assert (store.documents, store.read(0, 7).tolist()) == (3, list(range(7)))
    assert store.document_ends(0, 7).tolist() == [4, 7]


def test_megatrons_own_files_with_documents_of_several_sequences(tmp_path):
    documents = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8], [9], [10, 11, 12]]]
    for dtype in (np.uint16, np.int32):
        prefix = tmp_path / np.dtype(dtype).name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents[:2]:
            for sequence in document:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
        builder.add_document(torch.tensor(sum(documents[2], [])), [len(part) for part in documents[2]])
        builder.finalize(f"{prefix}.idx")
        store = TokenStore(prefix)
        assert (store.documents, store.tokens, store.dtype) == (3, 12, np.dtype(dtype))
        assert store.read(0, 12).tolist() == list(range(1, 13))
        assert store.document_ends(0, 12).tolist() == [5, 6, 12]
        assert store.document_ends(5, 4).tolist() == [1] and store.document_ends(6, 6).tolist() == [6]
        assert store.tokenizer is None and "no manifest" in store.note


def test_a_damaged_index_gives_an_error_or_ends_in_order(corpus, write_manifest):
    """Flipped bits anywhere behind the header: never a traceback of numpy's, never ends that go back."""
    write_manifest(corpus[0])  # so that opening hashes nothing
    prefix, path = corpus[0], corpus[0].with_name("corpus.idx")
    whole, draw, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[int(draw.integers(34, len(whole)))] ^= 1 << int(draw.integers(8))
        path.write_bytes(data)
        try:
            store = TokenStore(prefix)
            for start in range(0, store.tokens, 50):
                ends = store.document_ends(start, min(50, store.tokens - start))
                assert (np.diff(ends, prepend=0) > 0).all() and (ends <= 50).all()
        except IntegrityError as error:
            refused += 1
            assert str(path.parent / "corpus") in str(error)
    assert refused > 20


def test_descriptors_are_closed_with_the_store(corpus):
    before = len(os.listdir("/proc/self/fd"))
    stores = [TokenStore(corpus[0]) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 40
    del stores
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_worker_process_gets_the_prefix_and_no_tokens(tmp_path, write_pair):
    store = TokenStore(write_pair(tmp_path / "big", [list(range(30_000))]))
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).read(20_000, 2).tolist() == [20_000, 20_001]


def test_a_header_with_absurd_counts_is_refused(corpus):
    path = corpus[0].with_name("corpus.idx")
    data = bytearray(path.read_bytes())
    data[18:26] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"found {len(data):,}"):
        TokenStore(corpus[0])


def test_tokens_that_are_not_integers_are_refused(tmp_path, write_pair):
    prefix = write_pair(tmp_path / "floats", [[1, 2]], "int32")
    path = prefix.with_name("floats.idx")
    data = bytearray(path.read_bytes())
    data[17] = 7  # float32, of the same size
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="tokens are float32"):
        TokenStore(prefix)


def test_an_index_without_document_indices_is_refused(tmp_path):
    (tmp_path / "none.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 0, 0))
    (tmp_path / "none.bin").write_bytes(b"")
    with pytest.raises(IntegrityError, match="document indices do not run"):
        TokenStore(tmp_path / "none")
