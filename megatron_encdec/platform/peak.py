"""The device's peak arithmetic rate, the denominator of MFU."""

import time

import torch

from megatron_encdec.platform.device import device, device_type

# Dense tensor-core rates of the datasheets, FLOP/s.
_DATASHEET_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of one device: the datasheet's for known GPUs in bf16, else its own matrix product, measured."""
    if device_type() == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        for key, value in _DATASHEET_BF16.items():
            if key in name:
                return value
    return _measured_matmul(dtype)


def _measured_matmul(dtype: torch.dtype, size: int = 1024, repeats: int = 8) -> float:
    a, b = (torch.ones(size, size, dtype=dtype, device=device()) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        if device_type() == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
