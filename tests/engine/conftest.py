"""One rank, and a checkpoint that it wrote, for the tests of this room."""

import shutil

import pytest
from trunk_states import fill, make, state_at

from megatron_encdec.engine.saver import Saver


@pytest.fixture(scope="module")
def written(topology, tmp_path_factory):
    """A checkpoints directory with steps 1 and 2 of the known state. Only to be read."""
    directory = tmp_path_factory.mktemp("written") / "checkpoints"
    trunk, optimizer = make(topology)
    fill(trunk, optimizer)
    saver = Saver(directory, trunk, optimizer, keep=2, asynchronous=False)
    for step in (1, 2):
        saver.save(state_at(step))
    assert [event.error for event in saver.poll()] == [None, None]
    return directory


@pytest.fixture
def checkpoints(written, tmp_path):
    """A copy of `written` to do harm to."""
    return shutil.copytree(written, tmp_path / "checkpoints")
