"""Which device this process runs on, decided once, before `megatron.core` is imported; and what it can do."""

import math
import os
import time
from dataclasses import dataclass

import torch

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import CUDA_PACKAGES, INSTALL, why_unusable

_VARIABLE = "MEGATRON_ENCDEC_DEVICE"  # an environment variable, so that child processes agree
_AMPERE, _ADA, _HOPPER = (8, 0), (8, 9), (9, 0)
# Dense tensor-core rates of the datasheets, FLOP/s.
_DATASHEET_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


def meant(name: str) -> str:
    """The device type that `name` stands for here: auto, cpu or cuda (refused without a GPU)."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA GPU here; run `megatron-encdec doctor`, or use "
                        "--device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def choose(name: str) -> str:
    """Fix the device type for this process and its children; `name` as in `meant`."""
    os.environ[_VARIABLE] = meant(name)
    return os.environ[_VARIABLE]


def chosen() -> str | None:
    """"cuda" or "cpu" where this process, or the one that started it, has decided already; else None."""
    return os.environ.get(_VARIABLE)


def device_type() -> str:
    """"cuda" or "cpu", the same for the life of the process."""
    return chosen() or choose("auto")


def device() -> torch.device:
    """The device that holds this rank's tensors."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count() if device_type() == "cuda" else 0
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def use_deterministic_kernels() -> None:
    """`run.deterministic`: the same bits from the same inputs on a GPU too; a CPU always gives them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)


def bf16_is_native() -> bool:
    """Whether matrix products in bfloat16 are faster than in fp32 on this device."""
    if device_type() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def varlen_is_usable() -> bool:
    """Whether torch's attention over packed segments runs here: on a GPU that flash attention knows, torch 2.10 on."""
    return (device_type() == "cuda" and torch.cuda.get_device_capability() >= _AMPERE
            and why_unusable("torch.nn.attention.varlen") is None)


@dataclass(frozen=True)
class Fp8Facts:
    """Lowest compute capability of the GPUs (None: there is none), CUDA that torch is built for ("13.0"), state of
    Transformer Engine: `usable`, `missing` or `broken (why)`."""

    capability: tuple[int, int] | None
    cuda: str | None
    transformer_engine: str


def fp8_facts() -> Fp8Facts:
    """Of this process's device; on a CPU Transformer Engine is not looked for."""
    if device_type() == "cpu":
        return Fp8Facts(None, None, "usable")
    engine = why_unusable(CUDA_PACKAGES["transformer_engine"]) or "usable"
    return Fp8Facts(torch.cuda.get_device_capability(), torch.version.cuda, engine)


def fp8_refusal(recipe: str | None, facts: Fp8Facts) -> str:
    """Why `recipe` (None: any) is not possible with these `facts`; \"\" where it is."""
    reasons = []
    cuda = tuple(int(part) for part in (facts.cuda or "0.0").split(".")[:2])
    if facts.capability is None:
        reasons.append("there is no CUDA GPU")
    elif facts.capability < _ADA:
        reasons.append("the GPU is older than compute capability 8.9 (L40, H100 and later have FP8)")
    elif recipe == "blockwise" and (facts.capability < _HOPPER or cuda < (12, 9)):  # Transformer Engine's own check
        reasons.append("blockwise scaling needs compute capability 9.0 (H100 and later) and CUDA 12.9 or later")
    if facts.transformer_engine != "usable":
        reasons.append(f"Transformer Engine is {facts.transformer_engine}: {INSTALL['transformer_engine']}")
    return " and ".join(reasons)


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of one device, for MFU: the datasheet's for known GPUs in bf16, else its own matrix product, measured."""
    if device_type() == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        if known := [value for key, value in _DATASHEET_BF16.items() if key in name]:
            return known[0]
    best = 0.0
    for size in (128, 256, 512, 1024):
        a, b = (torch.ones(size, size, dtype=dtype, device=device()) for _ in range(2))
        fastest = math.inf  # of eight: on a machine that others use, any one may have to wait
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(a, b)
            if device_type() == "cuda":
                torch.cuda.synchronize()
            fastest = min(fastest, time.perf_counter() - start)
        best = max(best, 2 * size**3 / fastest)
        if fastest > 0.01:  # bf16 that a CPU emulates: as slow at any size, and most of a minute at the largest
            break
    return best
