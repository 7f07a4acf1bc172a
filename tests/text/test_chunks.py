"""The input in chunks: nothing twice, nothing left out, by any machine."""

import gzip
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpora import texts_of

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import chunks
from megatron_encdec.text.chunks import share_of, slots
from megatron_encdec.text.documents import Batch, read_chunk
from megatron_encdec.text.inputs import list_files
from megatron_encdec.text.manifest import InputFile


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of every kind, cut into chunks of about 50 bytes; empty ones at both ends."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 50)
    (tmp_path / "0.txt").write_bytes(b"")
    for name, count in (("a", 40), ("b", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(count)))
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as file:
        file.write(b"\n".join(b'{"text": "%d"}' % i for i in range(30)))
    for i in range(9):
        (tmp_path / f"d{i}.txt").write_text(f"text {i} " * i)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"] * 11}), tmp_path / "e.parquet", row_group_size=2)
    (tmp_path / "f.jsonl").write_bytes(b"")
    (tmp_path / "z.txt").write_bytes(b"")
    return list_files([tmp_path])


def documents_of(all_slots, spool):
    """(file, text) or (file, reason) of all chunks, in order inside each."""
    found = []
    for chunk in chunks.chunks(all_slots, spool, "text"):
        for part in read_chunk(chunk, "text"):
            assert isinstance(part, Batch)
            found += [(chunk.names[file], text.decode()) for (file, _, _), text in zip(part.places_D, part.texts_D,
                                                                                 strict=True)]
            found += [(chunk.names[file], reason) for reason, (file, _, _) in part.skipped]
    return found


def test_every_document_is_in_one_chunk(files, tmp_path):
    (tmp_path / "spool").mkdir()
    found = documents_of(slots(files, "text"), tmp_path / "spool")
    expected = {"0.txt": ["empty"], "z.txt": ["empty"], "a.jsonl": map(str, range(40)), "b.jsonl": ["0"],
                "c.jsonl.gz": map(str, range(30)), "e.parquet": ["row"] * 11}
    expected |= {f"d{i}.txt": [f"text {i} " * i or "empty"] for i in range(9)}
    assert sorted(found) == sorted((str(tmp_path / name), text) for name, texts in expected.items() for text in texts)
    assert len(list(slots(files, "text"))) > 20


@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_machines_share_all_of_it(files, tmp_path, count):
    total = sum(file.size for file in files)
    shares = [list(share_of(slots(files, "text"), i, count, total)) for i in range(1, count + 1)]
    assert sum(shares, []) == list(slots(files, "text"))
    empty = list_files([tmp_path / "z.txt", tmp_path / "f.jsonl"])
    assert sum(([*share_of(slots(empty, "text"), i, count, 0)] for i in range(1, count + 1)), []) == list(
        slots(empty, "text"))


def test_leaving_out_finished_chunks_changes_no_other(files, tmp_path):
    (tmp_path / "spool").mkdir()

    def spooled(skip):
        found = []
        for chunk in chunks.chunks(slots(files, "text"), tmp_path / "spool", "text", skip):
            found.append((chunk, Path(chunk.paths[0]).read_bytes() if chunk.spooled else b""))
        for path in (tmp_path / "spool").iterdir():
            path.unlink()
        return found

    whole = spooled(0)
    for skip in range(0, len(whole), 5):
        assert [block for _, block in spooled(skip)] == [block for _, block in whole[skip:]]


def test_a_hub_dataset_is_not_shared_out():
    with pytest.raises(UserError, match=r"--shard 1/2: cannot share out hf:some/name, whose size"):
        list(share_of(slots([InputFile("hf:some/name", 0, 0)], "text"), 1, 2, 0))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_stream_may_have_several_members(tmp_path, suffix):
    def pack(data):
        return gzip.compress(data) if suffix.endswith(".gz") else pyarrow.compress(data, "zstd", asbytes=True)

    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(b'{"text": "a"}\n{"te') + pack(b'xt": "b"}\n') + pack(b'{"text": "c"}'))
    assert texts_of(path) == ["a", "b", "c"]
    (tmp_path / "spool").mkdir()
    assert [text for _, text in documents_of(slots(list_files([path]), "text"), tmp_path / "spool")] == ["a", "b", "c"]


def test_a_file_that_shrinks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "%s"}\n' % (b"x" * 300))
    found = list(slots(list_files([path]), "text"))
    for size in (250, 60, 0):
        os.truncate(path, size)
        with pytest.raises(UserError, match=r"a\.jsonl: became shorter while it was read"):
            for chunk in found:
                list(read_chunk(chunk, "text"))
