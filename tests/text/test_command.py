"""The verb as a user runs it."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

from megatron_encdec.cli import main
from megatron_encdec.text import manifest as manifests

LIMITED = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
           "from megatron_encdec.cli import main; sys.exit(main(['preprocess', *sys.argv[2:]]))")


def run(*arguments):
    """The verb in this process."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main(["preprocess", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def test_summary_and_silence_of_the_second_run(mixed_corpus, tmp_path):
    command = ("--input", mixed_corpus[0], "--tokenizer", tmp_path / "tok", "--train-tokenizer", 300,
               "--output", tmp_path / "new" / "out", "--workers", 1, "--validation-percent", 10)
    first = subprocess.run([sys.executable, "-m", "megatron_encdec", "preprocess", *map(str, command)],
                           capture_output=True, text=True)
    assert (first.returncode, first.stderr.count("Traceback")) == (0, 0), first.stderr
    train, validation = manifests.read(tmp_path / "new/out"), manifests.read(tmp_path / "new/out.validation")
    assert train.documents + validation.documents == mixed_corpus[1]
    assert f"out: {train.documents} documents, {train.tokens:,} tokens (uint16)" in first.stdout
    assert f"out.validation: {validation.documents} documents" in first.stdout
    assert "skipped, bad_json: 3 (first: " in first.stdout
    assert "MB/s" in first.stderr
    second = run(*command)
    assert second.stdout == first.stdout
    assert "nothing to do" in second.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (("--input", "absent.txt", "--tokenizer", "t", "--output", "o"), "absent.txt: no such file or directory"),
    (("--input", "a.txt", "--output", "o"), "--tokenizer is missing"),
])
def test_mistakes_exit_with_2_and_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_teaches():
    result = run("--help")
    assert result.returncode == 0
    assert "--validation-percent P" in result.stdout
    assert "--train-tokenizer 8192 --tokenizer corpora/tokenizer" in result.stdout
    for option in ("--shard I/N", "--merge PREFIX", "--encoder", "--on-error", "hf:NAME[:CONFIG[:SPLIT]]", ".parquet"):
        assert option in result.stdout


def refusal(result):
    """The one line of a run that ended with exit code 2."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("megatron-encdec: ")]
    return line


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"a word {i} " * 20}) + "\n" for i in range(2000)))
    return path


@pytest.mark.parametrize("percent", [0, 50])
def test_a_full_disk_is_said_and_the_run_goes_on_later(lines, tokenizer_dir, tmp_path, percent):
    """A limit on the size of files, which stops the workers first and, where theirs are smaller, the parent."""
    command = ["--input", lines, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", "--workers", 1,
               "--validation-percent", percent]
    for limit in (0, 3000, 150_000):
        result = subprocess.run([sys.executable, "-c", LIMITED, str(limit), *map(str, command)], capture_output=True,
                                text=True)
        assert "out" in refusal(result)
        assert "File too large" in refusal(result)
        assert not (tmp_path / "out.bin").exists()
    assert run(*command).returncode == 0
    assert manifests.read(tmp_path / "out").documents > 0
    assert not (tmp_path / "out.partial").exists()


def test_a_disk_that_fills_up_while_merging(lines, tokenizer_dir, tmp_path):
    command = ["--tokenizer", tokenizer_dir, "--workers", 1, "--input", lines]
    for name in ("x", "y"):
        assert run(*command, "--output", tmp_path / name).returncode == 0
    merging = ["--merge", tmp_path / "x", tmp_path / "y", "--output", tmp_path / "xy"]
    size = (tmp_path / "x.bin").stat().st_size
    result = subprocess.run([sys.executable, "-c", LIMITED, str(size * 3 // 2), *map(str, merging)],
                            capture_output=True, text=True)
    assert "xy" in refusal(result)
    result = run(*merging)
    assert result.returncode == 0, result.stderr
    assert "4,000 documents" in result.stdout
    assert not (tmp_path / "xy.partial").exists()


def test_places_that_cannot_be_read_or_written(lines, tokenizer_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    command = ["--tokenizer", tokenizer_dir, "--workers", 1]
    for output in (tmp_path / "file" / "out", "/proc/out"):
        message = refusal(run(*command, "--input", lines, "--output", output))
        assert f"--output: {output}.partial cannot be written to" in message
    os.symlink("/proc/self/mem", tmp_path / "b.jsonl")  # opens, and cannot be read: even for root
    message = refusal(run(*command, "--input", tmp_path / "b.jsonl", lines, "--output", tmp_path / "out"))
    assert f"{tmp_path}/b.jsonl: cannot read the input" in message
    os.symlink("/nowhere", tmp_path / "c.jsonl")
    message = refusal(run(*command, "--input", tmp_path / "c.jsonl", "--output", tmp_path / "out"))
    assert "c.jsonl: a link to /nowhere, which cannot be read (No such file" in message
    if os.geteuid():
        lines.chmod(0)
        message = refusal(run(*command, "--input", lines, "--output", tmp_path / "out"))
        assert f"{lines}: cannot read the input: Permission denied" in message


@pytest.mark.parametrize(("shard", "message"), [("0/3", "from 1 to 3"), ("4/3", "from 1 to 3"), ("1/0", "from 1 to 1"),
                                                ("3", "not of the form I/N"), ("²/3", "invalid")])
def test_malformed_shares(lines, tokenizer_dir, tmp_path, shard, message):
    result = run("--input", lines, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", "--shard", shard)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_why_not_gigatoken_is_said(lines, tokenizer_dir, tmp_path):
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "tokenizer.json").write_text(json.dumps(content))
    command = ["--input", lines, "--tokenizer", tmp_path / "lower", "--workers", 1, "--output", tmp_path / "out"]
    result = run(*command)
    assert result.returncode == 0
    assert "encoding with tokenizers" in result.stderr
    assert "gigatoken" in result.stderr
    assert manifests.read(tmp_path / "out").encoder.name == "tokenizers"


def test_a_new_line_between_texts_can_be_spelt_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"a": f"one {i}", "b": "two"}) + "\n" for i in range(50)))
    ended = run("--input", path, "--tokenizer", tmp_path / "tok", "--train-tokenizer", 300, "--workers", 1, "--output",
                tmp_path / "out", "--text-key", "a", "b", "--join", r"\n\t")
    assert ended.returncode == 0, ended.stderr
    settings = json.loads((tmp_path / "out.manifest.json").read_text())["settings"]
    assert settings["text_key"] == r"a + b joined by '\n\t'"
