"""Token files and a base config made once, for studies that really train."""

from pathlib import Path

import pytest
from small_run import make_workspace


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """`small_run.make_workspace`, once."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
