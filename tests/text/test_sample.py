"""What encoders are compared on: text from everywhere, a little of each place, whatever the documents' length."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_encdec.text.inputs import list_files
from megatron_encdec.text.sampling import BYTES_A_PLACE, DOCUMENTS_A_PLACE, PLACES, sample_texts


def test_small_input_is_taken_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"bad\n{"text": "two"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four"}\n{"text": "five"}'))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["six", None]}), tmp_path / "d.parquet")
    found = sample_texts(list_files([tmp_path]), "text")
    assert [text for text in found if text] == ["one", "two", "three", "four", "five", "six"]


def test_a_large_file_gives_text_from_all_its_length(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"{i} " + "word " * 20}) + "\n" for i in range(60_000))
    found = sample_texts(list_files([tmp_path]), "text")
    numbers = [int(text.split()[0]) for text in found]
    assert len(found) == PLACES * DOCUMENTS_A_PLACE
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 55_000


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".jsonl.gz", ".parquet"])
def test_very_long_documents_give_their_beginnings(tmp_path, suffix):
    text = "naïve words " * 300_000
    line = b'{"text": "first"}\n' + json.dumps({"text": text}, ensure_ascii=False).encode()
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
    else:
        path.write_bytes({".txt": text.encode(), ".jsonl": line, ".jsonl.gz": gzip.compress(line)}[suffix])
    found = sample_texts(list_files([path]), "text")
    assert any("naïve words naïve words" in text for text in found)
    assert BYTES_A_PLACE * 0.9 < sum(map(len, found)) <= BYTES_A_PLACE * PLACES


def test_many_files_are_sampled_evenly(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_text(f"{i}")
    found = [int(text) for text in sample_texts(list_files([tmp_path]), "text")]
    assert 10 <= len(found) <= PLACES
    assert found[-1] > 90
