import hashlib

import numpy as np
import pytest
import torch
from corpora import append, write_tokens
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_encdec.text import indexed
from megatron_encdec.text.indexed import IndexedWriter, bin_path, idx_path, read_header, token_dtype

DOCUMENTS = [[5, 6, 0], [7, 0], [0], [8, 9, 10, 11, 0]]


def write(prefix, dtype, documents=DOCUMENTS, at_once=2):
    return write_tokens(prefix, documents, dtype, at_once)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_it(tmp_path, dtype):
    write(tmp_path / "d", dtype)
    theirs = IndexedDataset(str(tmp_path / "d"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs[0].dtype == dtype
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_same_bytes_as_megatrons_writer(tmp_path, dtype):
    write(tmp_path / "ours", dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_index_larger_than_a_chunk(tmp_path, monkeypatch):
    documents = [[i % 7] * (1 + i % 3) for i in range(50)]
    write(tmp_path / "whole", "uint16", documents)
    monkeypatch.setattr(indexed, "CHUNK", 8)
    write(tmp_path / "pieces", "uint16", documents, at_once=7)
    assert idx_path(tmp_path / "whole").read_bytes() == idx_path(tmp_path / "pieces").read_bytes()


def test_hashes_are_of_the_files_shard_by_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "SHARD_SIZE", 8)
    files = write(tmp_path / "d", "uint16")
    content = bin_path(tmp_path / "d").read_bytes()
    assert files.bin_bytes == len(content) == 22
    assert files.shards == tuple(hashlib.sha256(content[i : i + 8]).hexdigest() for i in (0, 8, 16))
    assert files.idx_sha256 == hashlib.sha256(idx_path(tmp_path / "d").read_bytes()).hexdigest()


def test_width_follows_megatrons_rule():
    names = [token_dtype(size).name for size in (8191, 65499, 65500, 128256)]
    assert names == ["uint16", "uint16", "int32", "int32"]


def test_header_tells_sizes(tmp_path):
    write(tmp_path / "d", "int32")
    header = read_header(tmp_path / "d")
    assert (header.documents, header.sequences, header.bin_bytes, header.dtype) == (4, 4, 44, np.int32)


def test_an_interrupted_writer_is_continued_where_its_bytes_are_sound(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "SHARD_SIZE", 8)
    (tmp_path / "whole").mkdir()
    expected = write(tmp_path / "whole" / "d", "uint16")
    rows = [DOCUMENTS[:2], DOCUMENTS[2:]]
    records = [(sum(map(len, row)), 2, hashlib.sha256(np.array(sum(row, []), np.uint16).tobytes()).hexdigest())
               for row in rows]
    with IndexedWriter(tmp_path, "d", np.dtype("uint16")) as writer:
        for row in rows:
            append(writer, row)
    with open(tmp_path / "d.bin", "r+b") as file:
        file.seek(12)  # inside the second row
        file.write(b"?")
    with IndexedWriter(tmp_path, "d", np.dtype("uint16")) as writer:
        writer.go_on(*records[0][:2], writer.take_back(*records[0]))
        assert writer.take_back(*records[1]) is None
        writer.cut()
        append(writer, rows[1])
        assert writer.finish() == expected
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"d{suffix}").read_bytes() == (tmp_path / "whole" / f"d{suffix}").read_bytes()
