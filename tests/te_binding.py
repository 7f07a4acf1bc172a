"""Transformer Engine's own Python on a CPU: torch functions stand in for its compiled binding, and for it alone.

Import this before megatron.core, in a process of its own. `why_not` says why it is not possible here, else None.

    1. `_Names`, `_Binding`     the binding as a module: enums, and functions that fail when they are called
    2. products, norms, attention over packed segments, Adam, casts to FP8     what our layers call, in torch
    3. `on_a_gpu()`             while it is open Transformer Engine's checks for a GPU pass
    4. `calls`                  what its Python asked of the binding: (function, arguments)
    5. `around`                 a function put here is called in the place of each of the binding's, with that one first

As on Hopper an FP8 product takes both operands with the summed dimension last: else it is a failure, not a slow way.
"""

import contextlib
import enum
import functools
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

calls: list[tuple[str, SimpleNamespace]] = []
around: list = []


def _numbered(name: str, start: int, members: str) -> type:
    return enum.IntEnum(name, members.split(), start=start, module=__name__)


class DType(enum.IntEnum):
    """Those of its C++; its Python compares names."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class Backend(enum.IntEnum):
    """NVTE_Fused_Attn_Backend."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


Forward = _numbered("FP8FwdTensors", 0, " ".join(f"GEMM{n}_{kind}" for n in (1, 2, 3)
                                                 for kind in ("INPUT", "WEIGHT", "OUTPUT")))
Backward = _numbered("FP8BwdTensors", 0, " ".join(f"GRAD_{kind}{n}" for n in (1, 2, 3) for kind in ("OUTPUT", "INPUT")))
FP8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}


class _Names(int):
    """What the stand-in does not have: an enum, a member of one, a function that fails. Equal where the name is."""

    known: dict[str, "_Names"] = {}

    def __new__(cls, name: str):
        if name not in cls.known:
            cls.known[name] = super().__new__(cls, len(cls.known))
            cls.known[name].name = name
        return cls.known[name]

    def __getattr__(self, member: str):
        if member.startswith("__"):
            raise AttributeError(member)
        return _Names(f"{self.name}.{member}")

    def __call__(self, *_arguments, **_keywords):
        raise NotImplementedError(f"the stand-in for Transformer Engine's binding has no {self.name}")


class _Binding(types.ModuleType):
    """`transformer_engine_torch`."""

    DType, NVTE_Fused_Attn_Backend, FP8FwdTensors, FP8BwdTensors = DType, Backend, Forward, Backward

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name)


def get_cudnn_version() -> int:
    return 92000


def get_cublasLt_version() -> int:
    return 130100


def _wide(operand, last_is_summed: bool) -> torch.Tensor:
    """The rows of a product's operand, [rows, columns] in fp32, whatever it is held in."""
    if isinstance(operand, torch.Tensor) and not hasattr(operand, "_scale_inv"):
        return operand.reshape(-1, operand.shape[-1]).float()
    held = operand._data if last_is_summed else operand._transpose
    assert held is not None and (last_is_summed or not operand._transpose_invalid), "not cast as a product needs it"
    rows = held.reshape(-1, held.shape[-1]) if last_is_summed else held.reshape(held.shape[0], -1).t()
    return rows.view(torch.uint8).contiguous().view(FP8[operand._fp8_dtype]).float() * operand._scale_inv


def generic_gemm(A, transa, B, transb, D, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace,
                 workspace_size, accumulate, use_split_accumulator, comm_overlap=None, comm_type=None,
                 extra_output=None, bulk_overlap=False, alpha=1.0, beta=None):
    """op(B) op(A), added to D or written to it; `bias` is added, or in a backward pass its gradient is summed."""
    assert quantizer is None and comm_overlap is None and not gelu and alpha == 1.0 and beta in (0.0, 1.0)
    a, b = _wide(A, transa), _wide(B, not transb)
    product = (b.t() if transb else b) @ (a.t() if transa else a)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.sum(0).to(bias.dtype)
    elif bias is not None:
        product += bias.float()
    calls.append(("generic_gemm", SimpleNamespace(accumulate=accumulate, out=None if D is None else D.dtype,
                                                  fp8=(hasattr(A, "_scale_inv"), hasattr(B, "_scale_inv")))))
    if D is not None:
        D.add_(product.view(D.shape)) if accumulate else D.copy_(product.view(D.shape))
        return D, bias_gradient, None, extra_output
    out = product.to(torch.float32 if out_dtype == DType.kFloat32 else torch.bfloat16)
    shape = out.shape if transb else (*B.shape[:-1], out.shape[-1])
    return out.view(shape), bias_gradient, None, extra_output


def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, sm_margin, zero_centered):
    assert out is None
    inverse = (x.float().square().mean(-1) + eps).rsqrt()
    normed = (x.float() * inverse[..., None] * (weight.float() + zero_centered)).to(x.dtype)
    return (normed if quantizer is None else quantize(normed, quantizer)), None, inverse


def rmsnorm_bwd(dz, x, inverse, weight, sm_margin, zero_centered):
    unit, dz = x.float() * inverse[..., None], dz.view(x.shape).float()
    weighted = dz * (weight.float() + zero_centered)
    dx = inverse[..., None] * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz * unit).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def get_fused_attn_backend(parameters):
    """cuDNN's, for 16 bits and packed segments: what our trunk asks for and nothing else."""
    calls.append(("get_fused_attn_backend", parameters))
    suits = parameters.qkv_dtype == DType.kBFloat16 and parameters.qkv_layout == _layout()
    return (Backend.NVTE_F16_arbitrary_seqlen if suits else Backend.NVTE_No_Backend), "" if suits else "not packed bf16"


def _layout():
    return _Names("NVTE_QKV_Layout").NVTE_THD_THD_THD


def _masks():
    names = _Names("NVTE_Mask_Type")
    return {names.NVTE_PADDING_MASK: False, names.NVTE_PADDING_CAUSAL_MASK: True}


def _attend(query, key, value, cuts, scale, mask, window):
    """[T, H, D] of each segment between two `cuts` by itself; a token sees `window` before and after it, -1: all."""
    outputs = []
    for start, end in itertools.pairwise(cuts.tolist()):
        heads = [x[start:end].transpose(0, 1)[None].float() for x in (query, key, value)]
        before, after = (len(cuts) + end if side < 0 else side for side in window)
        seen = torch.ones(end - start, end - start, dtype=torch.bool).triu(-before)
        seen = seen.tril(0 if _masks()[mask] else after)
        outputs.append(torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=seen, enable_gqa=True, scale=scale)[0].transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def fused_attn_fwd(max_q, max_kv, training, scale, dropout, zero_fill, layout, out_format, scale_format, bias_type,
                   mask, softmax, window, bottom_right, cuts_q, cuts_kv, query, key, value, dtype, *rest):
    calls.append(("fused_attn_fwd", SimpleNamespace(
        mask=mask.name.rpartition(".")[2], cuts_q=cuts_q.tolist(), cuts_kv=cuts_kv.tolist(), longest=(max_q, max_kv),
        training=training, scale=scale, window=tuple(window), query=tuple(query.shape), key=tuple(key.shape))))
    assert layout == _layout() and dropout == 0.0 and torch.equal(cuts_q, cuts_kv)
    with torch.no_grad():
        return [_attend(query, key, value, cuts_q, scale, mask, window), torch.zeros(1), torch.zeros(2)]


def fused_attn_bwd(max_q, max_kv, scale, dropout, zero_fill, layout, out_format, gradient_format, gradient_layout,
                   scale_format, gradient_scale_format, bias_type, mask, softmax, window, bottom_right, deterministic,
                   cuts_q, cuts_kv, query, key, value, out, gradient, *rest):
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        out = _attend(*inputs, cuts_q, scale, mask, window)
    return [*torch.autograd.grad(out, inputs, gradient.view(out.shape)), None, None]


def multi_tensor_scale(chunk, overflow, lists, factor):
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def multi_tensor_adam(chunk, overflow, lists, lr, beta1, beta2, eps, step, decoupled, correct, decay):
    """AdamW on fp32 masters: gradients, parameters, first and second moments."""
    calls.append(("multi_tensor_adam", SimpleNamespace(step=step, parameters=len(lists[0]), lr=lr, decay=decay)))
    assert decoupled == 1
    first, second = (1 - beta1**step, 1 - beta2**step) if correct else (1.0, 1.0)
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.sub_(lr * (mean / first / ((square / second).sqrt() + eps) + decay * parameter))


def quantize(source, quantizer, target=None, skip=None):
    """One scale a tensor: the quantizer's own, which notes the largest value, or the largest value's."""
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer, Float8Quantizer

    dtype, source = FP8[quantizer.dtype], source.detach()
    most, largest = torch.finfo(dtype).max, source.float().abs().max()
    if isinstance(quantizer, Float8Quantizer):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
        scale = quantizer.scale.clone().view(())
    else:
        assert isinstance(quantizer, Float8CurrentScalingQuantizer)
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
        scale = most / largest.clamp(min=1e-12)
    calls.append(("quantize", SimpleNamespace(anew=target is None)))
    if target is None:
        target = create_empty_quantized_tensor(quantizer, source.shape, source.dtype, source.device)
    data = (source.float() * scale).clamp(-most, most).to(dtype).view(torch.uint8)
    for held, values in ((target._data, data), (target._transpose, fp8_transpose(data, dtype))):
        if held is not None:
            held.copy_(values)
    target._transpose_invalid = target._transpose is None
    target._scale_inv.copy_((1 / scale).view(1))
    return target


def create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory=False):
    """Row by row, column by column or both, as the quantizer is to be used."""
    from transformer_engine.pytorch import Float8Tensor
    from transformer_engine.pytorch.tensor import Float8TensorStorage

    def empty(wanted, *size):
        return torch.zeros(*size, dtype=torch.uint8) if wanted else None

    parts = dict(data=empty(quantizer.rowwise_usage, *shape), fp8_scale_inv=torch.ones(1), quantizer=quantizer,
                 data_transpose=empty(quantizer.columnwise_usage, shape[-1], *shape[:-1]), fp8_dtype=quantizer.dtype)
    if quantizer.internal:
        return Float8TensorStorage(**parts, fake_dtype=dtype)
    return Float8Tensor(shape=shape, dtype=dtype, device=torch.device("cpu"), requires_grad=False, **parts)


def bgrad_quantize(gradient, quantizer):
    summed = gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(gradient.dtype)
    return summed, quantize(gradient, quantizer)


def fp8_transpose(data, dtype, *, out=None):
    flat = data.reshape(-1, data.shape[-1]).t().contiguous().view(data.shape[-1], *data.shape[:-1])
    return flat if out is None else out.copy_(flat)


def fused_amax_and_scale_update_after_reduction(largest, histories, scales, algorithm, dtype, margin):
    """The delayed recipe's end of a step: the largest values go into the histories, scales come out of them."""
    assert algorithm == "max"
    most, parts = torch.finfo(FP8[dtype]).max, largest.split([scale.numel() for scale in scales])
    for part, history, scale in zip(parts, histories, scales, strict=True):
        if history.shape[0] > 1:
            history[0].copy_(part)  # this step's, which lies first, reduced over the ranks
        top = torch.where(history.amax(0) > 0, history.amax(0), torch.zeros(()))
        history.copy_(torch.roll(history, -1, 0))
        history[0].fill_(0.0)
        scale.copy_(torch.where(top > 0, most / top.clamp(min=1e-30) / 2**margin, scale))


_FUNCTIONS = (get_cudnn_version, get_cublasLt_version, generic_gemm, rmsnorm_fwd, rmsnorm_bwd, get_fused_attn_backend,
              fused_attn_fwd, fused_attn_bwd, multi_tensor_scale, multi_tensor_adam, quantize,
              create_empty_quantized_tensor, bgrad_quantize, fp8_transpose,
              fused_amax_and_scale_update_after_reduction)


def _open_to_others(function):
    @functools.wraps(function)
    def call(*arguments, **keywords):
        return around[-1](function, *arguments, **keywords) if around else function(*arguments, **keywords)

    return call


def _install() -> None:
    """Import Transformer Engine's Python over the stand-in."""
    binding = sys.modules["transformer_engine_torch"] = _Binding("transformer_engine_torch")
    binding.__file__, binding.__spec__ = __file__, importlib.machinery.ModuleSpec(binding.__name__, None)
    for function in _FUNCTIONS:
        setattr(binding, function.__name__, _open_to_others(function))
    for name in ("layernorm_fwd", "layernorm_bwd"):  # looked up beside those of RMSNorm
        setattr(binding, name, _Names(name))
    cuda = torch.cuda
    cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="none")
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    missing = [] if importlib.util.find_spec("triton") else ["triton", "triton.language", "triton.language.standard"]
    if missing:  # torch's builds for a CPU have none: its decorators are met at import, its kernels never
        importlib.import_module("torch._dynamo")
        importlib.import_module("torch._inductor.runtime.hints")  # before triton seems to be there
        sys.modules |= {name: MagicMock(__version__="3.7.1", __spec__=None) for name in missing}
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its core, a library of kernels, is not looked for
    try:
        with _no_extension():
            distributed = importlib.import_module("transformer_engine.pytorch.distributed")
    finally:
        del os.environ["NVTE_PROJECT_BUILDING"]
        for name in missing:
            del sys.modules[name]
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


@contextlib.contextmanager
def _no_extension():
    """transformer_engine.common loads no library: the binding is there already."""
    find = importlib.machinery.PathFinder.find_spec

    def find_spec(name, path=None, target=None):
        spec = find(name, path, target)
        if name == "transformer_engine.common":
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                module.load_framework_extension = lambda _framework: None

            spec.loader.exec_module = exec_module
        return spec

    importlib.machinery.PathFinder.find_spec = find_spec
    try:
        yield
    finally:
        importlib.machinery.PathFinder.find_spec = find


@contextlib.contextmanager
def on_a_gpu():
    """Tensors and torch say that there is a GPU, while this is open: what Transformer Engine asks before it works."""
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    torch.Tensor.is_cuda = property(lambda _tensor: True)
    try:
        yield
    finally:
        torch.cuda.is_available = available
        del torch.Tensor.is_cuda


def _why_not() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "needs Transformer Engine's Python: its head says how (ENCDEC_ENV=te)"
    if torch.cuda.is_available() or importlib.util.find_spec("transformer_engine_torch"):
        return "a binding or a GPU is here: -m te runs the real kernels"
    if "megatron.core" in sys.modules:
        return "megatron.core was imported without Transformer Engine: run these tests alone"
    return None


why_not = _why_not()
if why_not is None:
    _install()
