"""Generated corpora through chunks, workers and accounts, against ten lines of plain reading.

The sizes from which documents are handled piece by piece are set to a few bytes, so that small corpora take every
path: lines across chunks, strings set apart, escapes at cuts, texts encoded in parts.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import chunks, documents, encode, encoder, parquet
from megatron_encdec.text.encode import Worker, ids_path
from megatron_encdec.text.indexed import token_dtype
from megatron_encdec.text.inputs import list_files
from megatron_encdec.text.manifest import TRAIN, VALIDATION
from megatron_encdec.text.partial import Tally
from megatron_encdec.text.preprocess import preprocess
from megatron_encdec.text.tokenizer import load_tokenizer

EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")  # of zstd

# --------------------------------------------------------------------------------------------- what is generated
FRAGMENTS = [b" ", b"  ", b"a", b"word", b"two words", b"x" * 40, b"\\n", b"\\\\", b'\\"', b"\\/", b"\\u0041",
             b"\\ud83d\\ude00", b"\\uD83D\\uDE00", b"\\ud83d", b"\\uDE00", b"\\u12", b"\\x", b"\\", b"\x00", b"\\u0000",
             b"\t", b"\x7f", "é".encode(), "東京".encode(), "👩‍👩‍👧".encode(), "e\u0301".encode(), b"\xff", b"\xc3",
             b"\xed\xa0\x80", b"\xef\xbb\xbf", b"<|endoftext|>", b"12345", b"\r", b"\xe2\x80\xa8", b"'s", b"\x1f"]
SOUND = [piece for piece in FRAGMENTS if b"\\" not in piece[:1] and min(piece) >= 0x20 and max(piece) < 0xed
         ] + [b"\\ud83d\\ude00", b"\\n", b"\\\\", b"\\u0041"]
string_body = (st.lists(st.sampled_from(SOUND), max_size=12) | st.lists(st.sampled_from(FRAGMENTS), max_size=8)
               ).map(b"".join)
value = st.one_of(
    string_body.map(lambda body: b'"%b"' % body), string_body.map(lambda body: b'"%b"' % body),
    st.sampled_from([b"1", b"null", b"true", b"NaN", b"1e999", b"[]", b"{}", b'["text"]', b'{"text": "in"}', b"-",
                     b"9" * 5000, b"[" * 3000, b'{"a":' * 30 + b"1" + b"}" * 30]),
    st.text(st.characters(exclude_categories=()), max_size=20).map(lambda text: json.dumps(text).encode()))
key = st.sampled_from([b'"text"', b'"text"', b'"text"', b'"id"', b'"t\\u0065xt"', b'"' + b"k" * 40 + b'"', b"text"])
pair = st.tuples(key, st.sampled_from([b":", b": ", b" : ", b""]) | st.just(b": "), value).map(b"".join)
json_line = st.lists(pair, min_size=1, max_size=3).map(lambda pairs: b"{%b}" % b", ".join(pairs))
line = st.one_of(
    json_line, json_line, json_line,
    st.text(max_size=60).map(lambda text: json.dumps({"id": 1, "text": text}, ensure_ascii=False).encode(
        "utf-8", "surrogatepass")),
    json_line.flatmap(lambda text: st.integers(0, len(text)).map(lambda cut: text[:cut])),
    st.sampled_from([b"", b" ", b"\t \r", "\u2003".encode(), b"[1]", b'"text"', b"[" * 3000, b"{} {}"]),
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(b"".join), st.binary(max_size=30))
ending = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b" \n", b"\n\n"])
lines = st.lists(st.tuples(line, ending).map(b"".join), max_size=8)
content = st.tuples(st.sampled_from([b"", b"", b"\xef\xbb\xbf"]), lines.map(b"".join), line | st.just(b"")).map(
    b"".join)
row = st.none() | st.lists(st.sampled_from([*FRAGMENTS, b"\0", b"\xff\xfe"]), max_size=12).map(b"".join)
whole_text = st.lists(st.sampled_from([*FRAGMENTS, b"\n", b"\r\n"]), max_size=20).map(b"".join) | st.binary(max_size=50)
file = st.one_of(st.tuples(st.just(".jsonl"), content), st.tuples(st.just(".jsonl"), content),
                 st.tuples(st.sampled_from([".jsonl.gz", ".jsonl.zst", ".json", ".ndjson", ".json.gz"]), content),
                 st.tuples(st.sampled_from([".txt", ".md"]), whole_text),
                 st.tuples(st.just(".parquet"), st.lists(row, max_size=5)))
corpus = st.lists(file, min_size=1, max_size=4)
limits = st.fixed_dictionaries({"chunk": st.sampled_from([1, 7, 40, 200, 1 << 20]),
                                "long": st.sampled_from([16, 60, 1 << 20]), "piece": st.sampled_from([10, 13, 20]),
                                "characters": st.sampled_from([16, 40]), "batch": st.sampled_from([1, 50, 1 << 20])})


# ------------------------------------------------------------------------------------------------- the reference
def expected_of(data: bytes):
    """(text, None) or (None, reason) of a line, by json.loads alone."""
    try:
        string = data.decode("utf-8")
        if not string.strip():
            return None, "empty"
        value = json.loads(string)
    except UnicodeDecodeError:
        return None, "bad_utf8"
    except (ValueError, RecursionError):
        return None, "bad_json"
    if not isinstance(value, dict):
        return None, "bad_json"
    if "text" not in value:
        return None, "missing_key"
    return text_or_reason(value["text"])


def text_or_reason(text):
    if not isinstance(text, str):
        return None, "not_text"
    if not text.strip():
        return None, "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None, "bad_utf8"
    return text, None


def expected_of_text(data: bytes):
    """(text, None) or (None, reason) of bytes that are one text."""
    body = data.removeprefix(b"\xef\xbb\xbf")
    halves = [set(body[:1024][start::2]) for start in (0, 1)]
    if body[:2] in (b"\xff\xfe", b"\xfe\xff") or body[:4] == b"\0\0\xfe\xff" or (
            len(body) >= 8 and {0} in halves and any(0 not in half for half in halves)):
        return None, "utf16"
    if b"\0" in body[:2] and set(body) <= set(b"\0 \t\r\n"):
        return None, "empty"
    try:
        return text_or_reason(body.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "bad_utf8"


def expected_of_file(suffix: str, data):
    """[(line, bytes, text, reason)] of a file: of its bytes, or of a Parquet file's rows."""
    if suffix == ".parquet":
        return [(number, len(row or b""), *((None, "not_text") if row is None else expected_of_text(row)))
                for number, row in enumerate(data, start=1)]
    if suffix in (".txt", ".md"):
        return [(1, len(data), *expected_of_text(data))]
    pieces = data.split(b"\n")
    sizes = [len(piece) + 1 for piece in pieces[:-1]] + [len(pieces[-1])] * bool(pieces[-1])
    return [(number, size, *expected_of(piece.removeprefix(b"\xef\xbb\xbf") if number == 1 else piece))
            for number, (piece, size) in enumerate(zip(pieces, sizes, strict=False), start=1)]


# --------------------------------------------------------------------------------------------------- ours, in-process
@contextlib.contextmanager
def small(limits):
    """The limits of the long paths, set for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", limits["chunk"])
        patch.setattr(chunks, "PIECE", limits["piece"])
        patch.setattr(documents, "LONG", limits["long"])
        patch.setattr(documents, "PIECE", limits["piece"])
        patch.setattr(documents, "BYTES_IN_BATCH", limits["batch"])
        patch.setattr(parquet, "BYTES_AT_ONCE", limits["batch"])
        for module in (encode, encoder):
            patch.setattr(module, "LONG_CHARACTERS", limits["characters"])
        patch.setattr(encoder, "WINDOW", 8)
        yield


def write(folder, files):
    """The files of a generated corpus; their paths."""
    paths = []
    for number, (suffix, data) in enumerate(files):
        paths.append(folder / f"{number}{suffix}")
        if suffix == ".parquet":
            kind = [pyarrow.binary(), pyarrow.binary_view(), pyarrow.large_binary()][len(data) % 3]
            column = pyarrow.array(data, kind) if any(data) else pyarrow.array(data)  # of nulls, for one
            pyarrow.parquet.write_table(pyarrow.table({"text": column}), paths[-1], row_group_size=2)
            continue
        if suffix.endswith(".gz"):
            data = gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
        elif suffix.endswith(".zst"):
            data = pyarrow.compress(data, "zstd", asbytes=True) if data else EMPTY_FRAME
        paths[-1].write_bytes(data)
    return paths


def readable(paths, files):
    """(path, file) of those that are not refused as a whole; the first line of one that is, is no document."""
    kept = []
    for path, file in zip(paths, files, strict=True):
        try:
            list_files([path])
            kept.append((path, file))
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            texts = [text for _, _, text, reason in expected_of_file(*file) if reason != "empty"]
            assert not texts or texts[0] is None or "a Git LFS pointer" in str(error)
    return kept


def run(work, folder, paths, splits):
    """Chunk after chunk as `preprocess` does it: (tally, {split: ids of each document})."""
    files, tally = list_files(paths) if paths else [], Tally(splits)
    found = {split: [] for split in splits}
    for number, chunk in enumerate(chunks.chunks(chunks.slots(files, "text"), folder, "text")):
        account = work((number, chunk))
        tally.add(json.loads(json.dumps(tally.named(account, chunk))))
        for split in splits:
            ids = np.fromfile(ids_path(folder, number, split), np.uint16)
            assert account.splits[split].tokens == len(ids) == account.lengths[split].sum()
            assert account.splits[split].documents == len(account.lengths[split])
            rows = np.split(ids, np.cumsum(account.lengths[split]))[:-1]
            assert all(row[-1] == 0 and not (row[:-1] == 0).any() for row in rows)
            found[split] += [row[:-1].tolist() for row in rows]
        encode.remove_parts(folder, number)
    return tally, found


def check(tokenizer, work, folder, files, splits):
    """All that has to add up for one corpus."""
    every = write(folder, files)
    kept = readable(every, files)
    paths, files = [path for path, _ in kept], [file for _, file in kept]
    tally, found = run(work, folder, paths, splits)
    expected = [(path, *document) for path, (suffix, data) in zip(paths, files, strict=True)
                for document in expected_of_file(suffix, data)]
    reasons = {}
    for path, number, _, _, reason in expected:
        if reason:
            reasons.setdefault(reason, []).append(f"{path}:{number}")
    skipped = tally.skipped()
    assert {reason: record.count for reason, record in skipped.items()} == {
        reason: len(places) for reason, places in reasons.items()}
    assert {reason: list(record.examples) for reason, record in skipped.items()} == {
        reason: places[:3] for reason, places in reasons.items()}
    texts = [text for _, _, _, text, _ in expected if text is not None]
    drawn = {split: [text for text in texts if len(splits) == 1 or is_drawn(text) == (split == VALIDATION)]
             for split in splits}
    for split in splits:
        assert [tokenizer.decode(ids) for ids in found[split]] == drawn[split]
        if not tally.unproven:
            assert found[split] == tokenizer.encode_batch(drawn[split])
    assert tally.bytes_in == sum(size for _, _, size, _, _ in expected)
    assert all(suffix == ".parquet" or len(data) == sum(size for _, size, _, _ in expected_of_file(suffix, data))
               for suffix, data in files)
    assert sum(sums["characters"] for sums in tally._splits.values()) == sum(map(len, texts))
    assert tally.consumed <= sum(path.stat().st_size for path in paths)
    for path in every:
        path.unlink()
    assert os.listdir(folder) == []


def is_drawn(text):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 2**64 * 0.3


@pytest.fixture(scope="module", params=["gigatoken", "tokenizers"])
def encoding(request, tokenizer_dir, tmp_path_factory):
    """(tokenizer, {splits: worker}, folder) with one of the encoders."""
    folder = tmp_path_factory.mktemp("fuzz")
    workers = {splits: Worker(str(tokenizer_dir), None, None, request.param, "text",
                              30.0 if len(splits) == 2 else 0.0, str(folder))
               for splits in ((TRAIN,), (TRAIN, VALIDATION))}
    tokenizer = load_tokenizer(tokenizer_dir)
    assert token_dtype(tokenizer.vocabulary_size) == np.uint16
    return tokenizer, workers, folder


def attack(encoding, files, sizes, split):
    tokenizer, workers, folder = encoding
    splits = (TRAIN, VALIDATION) if split else (TRAIN,)
    for path in folder.iterdir():  # of an example that failed
        path.unlink()
    total = sum(size for file in files for _, size, _, _ in expected_of_file(*file))
    with small(sizes | {"chunk": max(sizes["chunk"], total // 20)}):  # a chunk costs two files
        check(tokenizer, workers[splits], folder, files, splits)


RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=300, **RELAXED)
@given(files=corpus, sizes=limits, split=st.booleans())
def test_hundreds_of_corpora_add_up(encoding, files, sizes, split):
    attack(encoding, files, sizes, split)


@pytest.mark.slow
@settings(max_examples=20_000, **RELAXED)
@given(files=corpus, sizes=limits, split=st.booleans())
def test_many_thousand_corpora_add_up(encoding, files, sizes, split):
    attack(encoding, files, sizes, split)


@settings(max_examples=12, **RELAXED)
@given(files=corpus)
def test_the_whole_command_adds_up(tokenizer_dir, tmp_path_factory, files):
    """With a worker process, and the limits as they are; one good document in front, for there has to be one."""
    folder = tmp_path_factory.mktemp("whole")
    files = [(".txt", b"good"), *files]
    kept = readable(write(folder, files), files)
    paths, files = [path for path, _ in kept], [file for _, file in kept]
    manifest = preprocess(paths, tokenizer_dir, folder / "out", workers=1, progress=False)
    expected = [document for suffix, data in files for document in expected_of_file(suffix, data)]
    texts = [text for _, _, text, _ in expected if text is not None]
    ids = load_tokenizer(tokenizer_dir).encode_batch(texts)
    assert (folder / "out.bin").read_bytes() == np.array(sum(([*row, 0] for row in ids), []), np.uint16).tobytes()
    assert manifest.documents == len(texts)
    assert sum(record.count for record in manifest.skipped.values()) == len(expected) - len(texts)
    assert manifest.characters == sum(map(len, texts))
    assert manifest.bytes_in == sum(size for _, size, _, _ in expected)
    shutil.rmtree(folder)
