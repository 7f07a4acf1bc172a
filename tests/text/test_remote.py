"""Inputs by URL: the same bytes as from files, from a store in memory and from a server of this machine."""

import gzip
import hashlib
import http.server
import importlib.util
import json
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from megatron_encdec.cli import main
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import chunks, remote
from megatron_encdec.text.inputs import list_files
from megatron_encdec.text.preprocess import preprocess

fsspec = pytest.importorskip("fsspec")
LINES = [json.dumps({"text": f"document {i} " + "of words and more words " * (i % 9)}) for i in range(4000)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a file of each kind, and a tokenizer."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("remote")
    (folder / "in/deep").mkdir(parents=True)
    (folder / "in/a.jsonl").write_text("\n".join(LINES) + "\n")
    (folder / "in/b.jsonl.gz").write_bytes(gzip.compress("\n".join(LINES[:900]).encode()))
    (folder / "in/deep/c.txt").write_text("a text of its own\nin two lines")
    (folder / "in/deep/d.md").write_text("another text")
    parquet.write_table(pyarrow.table({"id": list(range(500)), "text": [f"row {i}" if i % 50 else None
                                                                        for i in range(500)]}),
                        folder / "in/e.parquet", row_group_size=200)
    (folder / "in/f.csv").write_text("not,read")
    (folder / "in/.hidden.jsonl").write_text(LINES[0])
    preprocess([folder / "in/a.jsonl"], folder / "tokenizer", folder / "first", train_tokenizer=400, progress=False,
               workers=1)
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several chunks of a small file, and no waiting between attempts."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 50_000)
    monkeypatch.setattr(chunks, "PIECE", 7_000)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)


@pytest.fixture
def memory(sources):
    """memory://bucket/ with the files of `sources`."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    for path in (sources / "in").rglob("*"):
        if path.is_file():
            store.pipe(f"/bucket/{path.relative_to(sources / 'in')}", path.read_bytes())
    yield store
    store.store.clear()


def made(prefix) -> dict[str, str]:
    return {end: hashlib.sha256((prefix.parent / f"{prefix.name}{end}").read_bytes()).hexdigest()
            for end in (".bin", ".idx")}


def run(sources, prefix, *inputs, **settings):
    return preprocess(inputs, sources / "tokenizer", prefix, progress=False, workers=1, **settings)


def test_a_folder_of_a_store_is_what_it_is_on_disk(sources, memory, tmp_path, capsys):
    here = run(sources, tmp_path / "here", sources / "in")
    there = run(sources, tmp_path / "there", "memory://bucket")
    assert made(tmp_path / "here") == made(tmp_path / "there")
    assert (here.documents, here.tokens, here.bytes_in) == (there.documents, there.tokens, there.bytes_in)
    assert {reason: one.count for reason, one in here.skipped.items()} == {"not_text": 10} == {
        reason: one.count for reason, one in there.skipped.items()}
    assert there.skipped["not_text"].examples[0] == "memory:///bucket/e.parquet:1"
    assert "not read: 1 .csv, 1 hidden" in capsys.readouterr().err
    assert [(one.size > 0, one.mtime_ns, one.version != "") for one in there.inputs] == [(True, 0, True)] * 5


def test_patterns_and_single_objects(memory, sources):
    def names(*inputs):
        return [file.path for file in list_files(inputs)]

    assert names("memory://bucket/*.jsonl*") == ["memory:///bucket/a.jsonl", "memory:///bucket/b.jsonl.gz"]
    assert names("memory://bucket/deep/c.txt", "memory://bucket/deep") == [
        "memory:///bucket/deep/c.txt", "memory:///bucket/deep/d.md"]
    assert names("memory://bucket/**/*.txt") == ["memory:///bucket/deep/c.txt"]


def test_mistakes_are_one_line(memory, tmp_path):
    for url, says in (("memory://bucket/none.jsonl", "memory://bucket/none.jsonl: is not there"),
                      ("memory://bucket/*.none", "nothing matches this pattern"),
                      ("memory://bucket/f.csv", "cannot read this kind of file; supported: .txt"),
                      ("nosuch://bucket/a.jsonl", "no store of this kind is known"),
                      ("s3://bucket/a.jsonl", "needs the package s3fs.*pip install s3fs")):
        if url.startswith("s3") and importlib.util.find_spec("s3fs"):
            continue
        with pytest.raises(UserError, match=says):
            list_files([url])
    memory.pipe("/bucket/zipped.jsonl", gzip.compress(b"{}"))
    with pytest.raises(UserError, match="memory:///bucket/zipped.jsonl: holds gzip data"):
        list_files(["memory://bucket/zipped.jsonl"])


def test_an_interrupted_run_goes_on(sources, memory, tmp_path, monkeypatch):
    run(sources, tmp_path / "whole", "memory://bucket")
    from megatron_encdec.text import preprocess as module

    done, append = [], module._Output.append

    def stop_after_three(output, answer, chunk):
        if len(done) == 3:
            raise KeyboardInterrupt
        append(output, answer, chunk)
        done.append(chunk)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Output, "append", stop_after_three)
        run(sources, tmp_path / "again", "memory://bucket")
    fetched, fetch = [], chunks.fetched
    monkeypatch.setattr(chunks, "fetched", lambda chunk, *more: fetched.append(chunk) or fetch(chunk, *more))
    run(sources, tmp_path / "again", "memory://bucket")
    assert made(tmp_path / "again") == made(tmp_path / "whole")
    assert fetched[0].start == 3 * chunks.CHUNK_BYTES  # what was finished is not fetched again
    assert not (tmp_path / "again.partial").exists()


def test_an_object_that_changes_meanwhile_is_found(sources, memory, tmp_path, monkeypatch):
    fetch = chunks.fetched

    def changing(chunk, *more):
        memory.pipe("/bucket/a.jsonl", b'{"text": "x"}\n' * 9000)
        return fetch(chunk, *more)

    monkeypatch.setattr(chunks, "fetched", changing)
    with pytest.raises(UserError, match="memory:///bucket/.*(changed while it was read|became shorter)"):
        run(sources, tmp_path / "out", "memory://bucket/deep/c.txt", "memory://bucket/a.jsonl")


def test_fields_by_url(sources, memory, tmp_path, capsys):
    rows = [{"data": {"title": f"t{i}", "text": f"words {i}"}, "language": "en" if i % 3 else "de"} for i in range(90)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    memory.pipe("/bucket/n/nested.jsonl", text.encode())
    (tmp_path / "nested.jsonl").write_text(text)
    options = ["--tokenizer", str(sources / "tokenizer"), "--text-key", "data.title", "data.text", "--join", ": ",
               "--where", "language=en", "--workers", "1"]
    for name, source in (("there", "memory://bucket/n"), ("here", str(tmp_path / "nested.jsonl"))):
        assert main(["preprocess", "--input", source, "--output", str(tmp_path / name), *options]) == 0
    said = capsys.readouterr().out
    assert said.count("60 documents") == 2 and said.count("skipped, filtered: 30 (first: ") == 2
    assert made(tmp_path / "there") == made(tmp_path / "here")
    settings = json.loads((tmp_path / "here.manifest.json").read_text())["settings"]
    assert settings["text_key"] == "data.title + data.text joined by ': ' where language=en"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; knows ranges where `ranges`, fails every `fails`-th request where that is set, breaks an
    answer off after `most` bytes, gives those at another place than was asked for where `shifted`, and nothing at all
    for a whole block where `empty`."""

    ranges, fails, count, most, shifted, empty = True, 0, 0, 1 << 30, 0, False

    def log_message(self, *_):
        pass

    def do_GET(self):
        Handler.count += 1
        if Handler.fails and Handler.count % Handler.fails == 0:
            self.send_error(503)
            return
        if self.empty and self.headers.get("Range") not in (None, "bytes=0-0"):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            self.send_error(404)
            return
        data, wanted = Path(path).read_bytes(), self.headers.get("Range")
        begin, end = 0, len(data)
        if wanted and self.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first) + self.shifted, min(int(last) + 1 + self.shifted, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", hashlib.sha256(data).hexdigest()[:8])
        self.end_headers()
        self.wfile.write(data[begin:end][:self.most])


@pytest.fixture
def server(sources, monkeypatch):
    """The address of a server of this machine that gives the files of `sources`."""
    monkeypatch.setattr(Handler, "fails", 0)
    monkeypatch.setattr(Handler, "count", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(sources / "in")))
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()
    thread.join()


FILES = ("a.jsonl", "b.jsonl.gz", "deep/c.txt", "e.parquet")


@pytest.mark.parametrize("ranges", [True, False])
def test_files_of_a_server(ranges, sources, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "ranges", ranges)
    run(sources, tmp_path / "here", *(sources / "in" / name for name in FILES))
    there = run(sources, tmp_path / "there", *(f"{server}/{name}?download=true" for name in FILES))
    assert made(tmp_path / "here") == made(tmp_path / "there")
    assert there.inputs[0].path == f"{server}/a.jsonl?download=true" and there.inputs[0].version


def test_a_server_that_fails_now_and_then_is_asked_again(sources, server, tmp_path, monkeypatch, capsys):
    run(sources, tmp_path / "here", sources / "in/a.jsonl")
    listed = list_files([f"{server}/a.jsonl"])
    monkeypatch.setattr(Handler, "fails", 3)
    monkeypatch.setattr(remote, "BLOCK", 20_000)
    with remote.RemoteFile(listed[0].path) as file:
        assert file.readall() == (sources / "in/a.jsonl").read_bytes()
    assert "503" in capsys.readouterr().err


def test_what_an_answer_brought_before_it_broke_off_is_kept(sources, server, monkeypatch, capsys):
    """A connection that never lasts for a whole block: each request begins where the last one ended."""
    monkeypatch.setattr(Handler, "most", 3_000)
    with remote.RemoteFile(f"{server}/a.jsonl") as file:
        assert file.readall() == (sources / "in/a.jsonl").read_bytes()
    assert not capsys.readouterr().err


def test_bytes_of_another_place_are_not_taken(sources, server, monkeypatch):
    monkeypatch.setattr(Handler, "shifted", 1)
    with pytest.raises(UserError, match="a.jsonl: cannot be read .*asked for byte 0, and it sent 'bytes 1-"), \
            remote.RemoteFile(f"{server}/a.jsonl") as file:
        file.readall()


def test_a_server_that_sends_nothing_is_not_asked_for_ever(sources, server, monkeypatch):
    monkeypatch.setattr(Handler, "empty", True)
    with pytest.raises(UserError, match="a.jsonl: cannot be read .*no byte came from 0 on"), \
            remote.RemoteFile(f"{server}/a.jsonl") as file:
        file.readall()
    assert Handler.count < 20


def test_a_server_that_fails_at_the_first_look_is_asked_again(sources, server, monkeypatch, capsys):
    monkeypatch.setattr(Handler, "fails", 3)
    monkeypatch.setattr(Handler, "count", 2)
    files = list_files([f"{server}/a.jsonl"])
    assert files[0].size == (sources / "in/a.jsonl").stat().st_size and "503" in capsys.readouterr().err
    monkeypatch.setattr(Handler, "count", 2)
    assert not remote.changed([remote.Found(files[0].path, files[0].size, files[0].version)])


def test_a_url_with_letters_beyond_ascii_and_a_scheme_in_capitals(sources, server):
    (sources / "in/größe 1.txt").write_text("eins")
    try:
        for url in (f"{server}/größe 1.txt", f"{server}/gr%C3%B6%C3%9Fe%201.txt",
                    f"{server}/größe 1.txt".replace("http", "HTTP")):
            assert remote.is_remote(url)
            with remote.open_input(url) as file:
                assert file.read() == b"eins"
    finally:
        (sources / "in/größe 1.txt").unlink()


def test_a_file_that_the_server_does_not_have(server):
    with pytest.raises(UserError, match="/none.jsonl: is not there"):
        list_files([f"{server}/none.jsonl"])
    with pytest.raises(UserError, match="cannot be read .*check the name, the credentials and the network"):
        list_files(["http://127.0.0.1:9/a.jsonl"])


def test_parts_of_a_store_on_several_machines(sources, memory, tmp_path):
    run(sources, tmp_path / "whole", "memory://bucket")
    prefixes = [tmp_path / f"part-{i}" for i in (1, 2)]
    for i, prefix in enumerate(prefixes, 1):
        run(sources, prefix, "memory://bucket", share=(i, 2))
    assert main(["preprocess", "--merge", *map(str, prefixes), "--output", str(tmp_path / "merged")]) == 0
    assert made(tmp_path / "merged")[".bin"] == made(tmp_path / "whole")[".bin"]
