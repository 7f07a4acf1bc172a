"""Kernels of our own for GPUs, in Triton; imported where Triton is (`model/performance.py: kernels`).

    rotate(x, cos, sin, back)             rotary embedding: one pass over x in place of seven
    swiglu(rows)                          silu(gate) * up, and its gradient: a pass each, without a compiler's guards
    row_statistics(logits, ...)           maximum, sum of exponentials and the label's logit of each row: one pass
    logits_gradient_(logits, ...)         the gradient of the summed loss in the place of the logits: one pass

They are bound by memory, so one pass each is what counts (docs/performance.md). torch.compile would write the same
passes, but chooses sizes by measuring, and a sum's bits with them; here sizes are fixed, and so are the bits of a run
that is continued by another process. All arithmetic is in fp32.

Shape suffixes: T packed tokens, H heads, D head dimension; R rows, F their width; C rows, V this rank's vocabulary
columns.
"""

import torch
import triton
import triton.language as tl

_PAIRS = 1024  # of a program of `_rotate`
_COLUMNS = 8192  # of a step along a row of logits
_FEATURES = 1024  # of a program of `_swiglu`


def rotate(x_THD: torch.Tensor, cos_T1: torch.Tensor, sin_T1: torch.Tensor, back: bool = False) -> torch.Tensor:
    """x turned by the angles [T, 1, D/2], or back; contiguous."""
    tokens, heads, width = x_THD.shape
    if x_THD.stride(2) != 1:
        x_THD = x_THD.contiguous()
    turned = torch.empty((tokens, heads, width), dtype=x_THD.dtype, device=x_THD.device)
    pairs = turned.numel() // 2
    if pairs:
        _rotate[(triton.cdiv(pairs, _PAIRS),)](x_THD, cos_T1, sin_T1, turned, pairs, x_THD.stride(0), x_THD.stride(1),
                                               -1.0 if back else 1.0, heads, width // 2, _PAIRS)
    return turned


@triton.jit
def _rotate(x, cos, sin, turned, pairs, token_stride, head_stride, sign, HEADS: tl.constexpr, HALF: tl.constexpr,
            PAIRS: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    row, column = pair // HALF, pair % HALF
    token, head = row // HEADS, row % HEADS
    source = x + token * token_stride + head * head_stride + column
    first = tl.load(source, mask=inside).to(tl.float32)
    second = tl.load(source + HALF, mask=inside).to(tl.float32)
    c = tl.load(cos + token * HALF + column, mask=inside).to(tl.float32)
    s = sign * tl.load(sin + token * HALF + column, mask=inside).to(tl.float32)
    target = turned + row * (2 * HALF) + column
    tl.store(target, (first * c - second * s).to(turned.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(turned.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(context, rows):
        rows_RF = rows.flatten(0, -2).contiguous()
        context.save_for_backward(rows_RF)
        count, width = len(rows_RF), rows.shape[-1] // 2
        found_RF = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
        if found_RF.numel():
            _swiglu[count, triton.cdiv(width, _FEATURES)](rows_RF, found_RF, width, _FEATURES)
        return found_RF.view(*rows.shape[:-1], width)

    @staticmethod
    def backward(context, gradient):
        (rows_RF,), gradient_RF = context.saved_tensors, gradient.flatten(0, -2).contiguous()
        found_RF, (count, width) = torch.empty_like(rows_RF), gradient_RF.shape
        if found_RF.numel():
            _swiglu_gradient[count, triton.cdiv(width, _FEATURES)](
                rows_RF, gradient_RF, found_RF, width, _FEATURES)
        return found_RF.view(*gradient.shape[:-1], 2 * width)


def swiglu(rows: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows [..., 2F], gate first -> [..., F]."""
    return _SwiGLU.apply(rows)


@triton.jit
def _swiglu(rows, found, width, FEATURES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < width
    gate = tl.load(rows + row * (2 * width) + feature, mask=inside).to(tl.float32)
    up = tl.load(rows + row * (2 * width) + width + feature, mask=inside).to(tl.float32)
    tl.store(found + row * width + feature, (gate * tl.sigmoid(gate) * up).to(found.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient(rows, gradient, found, width, FEATURES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < width
    gate = tl.load(rows + row * (2 * width) + feature, mask=inside).to(tl.float32)
    up = tl.load(rows + row * (2 * width) + width + feature, mask=inside).to(tl.float32)
    above = tl.load(gradient + row * width + feature, mask=inside).to(tl.float32)
    opened = tl.sigmoid(gate)
    of_gate, of_up = above * up * opened * (1.0 + gate * (1.0 - opened)), above * gate * opened
    place = found + row * (2 * width) + feature
    tl.store(place, of_gate.to(found.dtype.element_ty), mask=inside)
    tl.store(place + width, of_up.to(found.dtype.element_ty), mask=inside)


def row_statistics(logits_CV: torch.Tensor, label_C: torch.Tensor, here_C: torch.Tensor, real: int
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row's first `real` columns, in fp32 [C]: maximum (-inf of none), sum of exp(x - maximum), and the logit
    of column `label` (0 where not `here`). Rows are contiguous."""
    rows = len(logits_CV)
    maximum_C, total_C, own_C = torch.empty((3, rows), dtype=torch.float32, device=logits_CV.device)
    if rows:
        _row_statistics[(rows,)](logits_CV, label_C, here_C, maximum_C, total_C, own_C, logits_CV.stride(0), real,
                                 _COLUMNS, num_warps=8)
    return maximum_C, total_C, own_C


@triton.jit
def _row_statistics(logits, labels, here, maximum, total, own, stride, real, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * stride
    largest = tl.full((), float("-inf"), tl.float32)
    summed = tl.zeros((), tl.float32)
    for start in range(0, real, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(begin + column, mask=column < real, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x))
        summed = summed * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger))
        largest = larger
    tl.store(maximum + row, largest)
    tl.store(total + row, summed)
    tl.store(own + row, tl.load(begin + tl.load(labels + row), mask=tl.load(here + row), other=0.0).to(tl.float32))


def logits_gradient_(logits_CV: torch.Tensor, maximum_C: torch.Tensor, total_C: torch.Tensor, label_C: torch.Tensor,
                     here_C: torch.Tensor, real: int, weights_C: torch.Tensor | None) -> torch.Tensor:
    """In the place of the logits: (exp(x - maximum) / total - one at the label), times the weight where there are some;
    0 from column `real` on."""
    rows, columns = logits_CV.shape
    if rows:
        _logits_gradient[(rows, triton.cdiv(columns, _COLUMNS))](
            logits_CV, maximum_C, total_C, label_C, here_C, maximum_C if weights_C is None else weights_C,
            logits_CV.stride(0), real, columns, weights_C is not None, _COLUMNS, num_warps=8)
    return logits_CV


@triton.jit
def _logits_gradient(logits, maximum, total, labels, here, weights, stride, real, columns, WEIGHTED: tl.constexpr,
                     COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = logits + row * stride + column
    x = tl.load(place, mask=column < real, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(maximum + row)) / tl.load(total + row)
    is_label = (column == tl.load(labels + row)) & tl.load(here + row)
    gradient = tl.where(is_label, gradient - 1.0, gradient)
    if WEIGHTED:
        gradient = gradient * tl.load(weights + row).to(tl.float32)
    gradient = tl.where(column < real, gradient, 0.0)  # also where a row's maximum is no number to take away
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < columns)
