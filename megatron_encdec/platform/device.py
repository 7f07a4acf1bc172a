"""Which device this process runs on, decided once, before `megatron.core` is imported.

    1. `choose(name)`       from the command line: auto | cpu | cuda; asking for a GPU where none is, is refused
    2. `device_type()`      "cuda" or "cpu", the same for the life of the process
    3. `device()`           the torch device of this rank
"""

import os

import torch

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import why_unusable

_VARIABLE = "MEGATRON_ENCDEC_DEVICE"  # an environment variable, so that child processes agree


def choose(name: str) -> str:
    """Fix the device type for this process and its children; `name` is auto, cpu or cuda."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA GPU here; run `megatron-encdec doctor`, "
                        "or use --device cpu")
    os.environ[_VARIABLE] = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    return os.environ[_VARIABLE]


def device_type() -> str:
    """"cuda" or "cpu"."""
    return os.environ.get(_VARIABLE) or choose("auto")


def device() -> torch.device:
    """The device that holds this rank's tensors."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def bf16_is_native() -> bool:
    """Whether matrix products in bfloat16 are faster than in fp32 on this device."""
    if device_type() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def varlen_is_usable() -> bool:
    """Whether torch's attention over packed segments runs here: on a GPU that flash attention knows, torch 2.10 on."""
    if device_type() != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        return False
    return why_unusable("torch.nn.attention.varlen") is None


def use_deterministic_kernels() -> None:
    """`run.deterministic`: the same bits from the same inputs on a GPU too; a CPU always gives them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)
