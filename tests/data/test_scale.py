"""Opening and finding samples cost the same at any size: real indices beside sparse tokens, made by the benchmark.

Times are in docs/performance.md; here stands what does not depend on the machine: memory, and that nothing waits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def measure(directory: Path, documents: float, tokens: float, *options: str) -> dict:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "order.py", "--documents", str(documents), "--tokens",
                    str(tokens), "--directory", directory, "--json", directory / "found.json", *options],
                   check=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads((directory / "found.json").read_text())


@pytest.mark.parametrize("lengths", ["lognormal", "sorted"])
def test_three_million_documents(tmp_path, lengths):
    found = measure(tmp_path, 3e6, 3e9, "--lengths", lengths, "--calls", "3000")
    assert found["memory_mb"] < 20  # the index has 60 MB
    assert found["open_seconds"] < 1 and found["refusal_seconds"] < 1


@pytest.mark.slow
def test_a_hundred_million_documents_and_a_hundred_billion_tokens(tmp_path):
    found = measure(tmp_path, 1e8, 1e11)
    assert found["memory_mb"] < 100  # the index has 2 GB
    assert found["open_seconds"] < 1 and found["refusal_seconds"] < 1
