"""The command line itself: what holds for every verb."""

import subprocess
import sys

import pytest

INTERRUPTED = """
import os, signal, sys
def interrupt(event, arguments):
    if event == "import" and arguments[0] == MODULE:
        signal.raise_signal(signal.SIGINT)
MODULE = sys.argv.pop(1)
sys.addaudithook(interrupt)
from megatron_encdec.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(("module", "command"), [
    ("orjson", "preprocess --input none --tokenizer none --output {}/out"),
    ("orjson", "study report {}/none --output {}/report"),
    ("torch", "import --help"),
])
def test_an_interrupt_among_the_imports_ends_the_process(module, command, tmp_path):
    """As an exception inside an extension module's initialisation it crashes orjson."""
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, module, *command.format(tmp_path, tmp_path).split()],
                            capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (-2, "")
