"""NeMo AutoModel on a machine without CUDA, and the one version of it that this was tested with.

The package is nemo-automodel, not nemo-toolkit: since version 3.0 that one is for speech alone.

On a CPU its recipe asks CUDA for two things that do not exist there: to reset memory statistics, and the current device
while the model is wrapped. A version that was not tested is refused by name: its inside may differ where we replace or
override something.

A process does many runs one after the other, so what is the same for all of them is done once: packages that NeMo
imports where it finds them and no run here uses are kept out (a fifth of the time until a process begins), logging is
set up once, and what imports leave behind is no garbage to look through after each run.
"""

import functools
import gc
import importlib.metadata
import logging
import os
import sys

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import INSTALL

TESTED = "0.7.0"
UNUSED = ("wandb", "megatron_fsdp")  # NeMo does without where their import fails
_INSTALL = INSTALL["nemo_automodel"]


def prepare() -> None:
    """Before anything of NeMo is used (again costs nothing): check the version, then keep out and replace what is named
    above."""
    try:
        check_version(importlib.metadata.version("nemo-automodel"))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"fine-tuning needs the package nemo-automodel; install it: {_INSTALL}") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # Python's own way to say: not there, do not look
    try:
        import torch
        from nemo_automodel.recipes.llm import train_seq_cls
    except Exception as error:  # noqa: BLE001  (triton 3.9 makes this import raise a ValueError)
        raise UserError(f"nemo-automodel cannot be imported here ({type(error).__name__}: {str(error).splitlines()[0]})"
                        f"; {_INSTALL} installs what it needs (triton 3.9 breaks it)") from None
    if not hasattr(train_seq_cls.setup_logging, "cache_info"):
        train_seq_cls.setup_logging = functools.cache(train_seq_cls.setup_logging)
        gc.freeze()
    if torch.cuda.is_available() or train_seq_cls.build_model is _build_on_cpu:
        return
    torch.cuda.reset_peak_memory_stats = lambda *_, **__: None
    train_seq_cls.build_model = _build_on_cpu
    logging.getLogger("nemo_automodel").setLevel(logging.WARNING)


def check_version(version: str) -> None:
    """Refuse a version that was not tested."""
    if version != TESTED:
        raise UserError(f"nemo-automodel {version} was never tested here (tested: {TESTED}); {_INSTALL} installs the "
                        "right one")


def _build_on_cpu(cfg_model, cfg_peft=None, seed: int = 42, **_):
    """NeMo's `build_model` without CUDA: the same seed, DDP over gloo where there are several ranks."""
    import torch
    from nemo_automodel.components.training.rng import ScopedRNG

    if cfg_peft is not None:
        raise UserError("peft: not on a CPU; leave it out")
    with ScopedRNG(seed=seed, ranked=True):
        model = cfg_model.instantiate()
    if torch.distributed.get_world_size() > 1:
        return torch.nn.parallel.DistributedDataParallel(model)
    return model
