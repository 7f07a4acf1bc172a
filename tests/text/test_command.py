"""The verb as a user runs it: a process of its own."""

import subprocess
import sys

import pytest

from megatron_encdec.text import manifest as manifests


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "megatron_encdec", "preprocess", *map(str, arguments)],
                          capture_output=True, text=True)


def test_summary_and_silence_of_the_second_run(mixed_corpus, tmp_path):
    command = ("--input", mixed_corpus[0], "--tokenizer", tmp_path / "tok", "--train-tokenizer", 300,
               "--output", tmp_path / "new" / "out", "--workers", 1, "--validation-percent", 10)
    first = run(*command)
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
