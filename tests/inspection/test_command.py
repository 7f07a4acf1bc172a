"""The verb's help, and what it refuses."""

import os
import subprocess
import sys

import pytest

from megatron_encdec.cli import main


@pytest.mark.parametrize(("words", "shown"), [
    (["inspect"], "data|run|checkpoint"), (["inspect", "data"], "[MASK:word]"),
    (["inspect", "run"], "unigram entropy"), (["inspect", "run"], "[END OF SEGMENT]"),
    (["inspect", "data"], "--verify"), (["inspect", "checkpoint"], "RUN_DIR[@STEP]"),
])
def test_help_teaches(capsys, words, shown):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0 and shown in capsys.readouterr().out


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "runs"], ["inspect", "run"],
                                   ["inspect", "data", "a", "--object", "x", "stray"]])
def test_wrong_words_exit_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_looking_at_data_needs_no_torch(workspace):
    """So that it answers at once."""
    code = ("import sys; from megatron_encdec.cli import main; code = main(sys.argv[1:]); "
            "sys.exit(code or 'torch' in sys.modules)")
    words = ["inspect", "data", str(workspace / "corpus"), "--tokenizer", str(workspace / "tokenizer")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, done.stderr
