"""One process group for the tests of this room."""

import pytest

from megatron_encdec.platform import distributed


@pytest.fixture(scope="session")
def topology():
    """Alone: one rank."""
    yield distributed.initialize()
    distributed.shutdown()
