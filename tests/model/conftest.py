"""One process group for the tests of a module; left behind it, since other rooms train in this process too."""

import pytest

from megatron_encdec.platform import distributed


@pytest.fixture(scope="module")
def topology():
    """Alone: one rank."""
    yield distributed.initialize()
    distributed.shutdown()
