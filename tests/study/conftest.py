"""Token files and a base config made once, for studies that really train."""

from pathlib import Path

import pytest
from small_run import workspace


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """`small_run.workspace`, once."""
    return workspace(tmp_path_factory.mktemp("workspace"))
