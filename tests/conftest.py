"""For all tests: one rank's process group; `gpu` and `te` tests skip where there is no GPU or no Transformer Engine."""

from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items):
    """Add the skips; torch is imported only if a test asks for a GPU."""
    marked = {name: [item for item in items if item.get_closest_marker(name)] for name in ("gpu", "te")}
    if marked["gpu"]:
        import torch

        if not torch.cuda.is_available():
            _skip(marked["gpu"], "needs a CUDA device")
    if find_spec("transformer_engine") is None:
        _skip(marked["te"], "needs Transformer Engine")


def _skip(items, reason: str) -> None:
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def topology():
    """One rank; gone after the module, since other modules' tests form groups of their own."""
    from megatron_encdec.interop.source import one_rank

    with one_rank() as alone:
        yield alone
