"""For all tests: one rank's process group; `gpu`, `te`, `te_python` and `nemo` tests skip where what they need is not
there."""

import signal

import pytest


def pytest_configure():
    """A shell lets what it runs in the background ignore Ctrl-C, and so would all that the tests start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Add the skips; torch and Transformer Engine are imported only if a test asks for them."""
    marked = {name: [item for item in items if item.get_closest_marker(name)]
              for name in ("gpu", "te", "te_python", "nemo")}
    if not any(marked.values()):
        return
    from megatron_encdec.platform.optional import CUDA_PACKAGES, is_available, why_unusable

    if not is_available("nemo_automodel"):
        _skip(marked["nemo"], "needs NeMo AutoModel: ENCDEC_ENV=nemo bash tests/run.sh -m 'nemo and not slow'")
    if marked["te_python"]:
        from te_binding import why_not

        if why_not:
            _skip(marked["te_python"], why_not)
    if not marked["gpu"] and not marked["te"]:
        return
    import torch

    if not torch.cuda.is_available():
        _skip(marked["gpu"] + marked["te"], "needs a CUDA device")
    elif marked["te"] and (why := why_unusable(CUDA_PACKAGES["transformer_engine"])):
        _skip(marked["te"], f"needs Transformer Engine, which is {why}")


def _skip(items, reason: str) -> None:
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def topology():
    """One rank; gone after the module, since other modules' tests form groups of their own."""
    from megatron_encdec.interop.source import one_rank

    with one_rank() as alone:
        yield alone
