"""Eight kills at random moments lose nothing; tools/torture.py does a hundred."""

import os
import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parent.parent / "tools" / "torture.py"


def test_killed_eight_times(tmp_path):
    result = subprocess.run([sys.executable, TOOL, "--kills", "8", "--seed", "1", "--work", tmp_path], text=True,
                            capture_output=True, timeout=1800, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "log.txt"
    assert result.returncode == 0, result.stdout + result.stderr + (log.read_text()[-4000:] if log.exists() else "")
    assert "identical, bit for bit" in result.stdout and "DIFFERENT" not in result.stdout
    assert int(re.search(r"(\d+) kills in", result.stdout).group(1)) >= 8
