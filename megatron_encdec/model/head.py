"""The head: the loss of the labelled positions, a chunk of positions at a time, over a vocabulary that is split.

A vocabulary of 128 256 makes the logits the largest tensor of a step: 4 bytes x positions x vocabulary, several times
over. Only the loss and its gradient need them, and both are known as soon as a chunk's logits are: so a chunk is
computed, turned into its loss and its part of the gradients, and forgotten.

    1. `Head`, `DenseHead`          the output layer: logits for who wants them, the loss for training; what some
                                    trunks have before it
    2. `linear_cross_entropy(...)`  the sum of the losses; its gradients are made in the forward pass, since the sum
                                    scales them all alike, and no logits are computed twice
    3. `_chunk`, `_chunk_by_kernels`  one chunk: statistics over the tensor group, then the gradient of its logits

Columns beyond the real vocabulary take no part: their probability is 0, and so is their gradient.

Shape suffixes: N labelled positions, C positions of a chunk, H hidden size, V this rank's vocabulary columns.
"""

import functools
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device

_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}  # of logits: few enough to lose, enough to be quick


class Head(mcore.ColumnParallelLinear):
    """megatron.core's output layer; called with labels it gives their summed loss and never all of the logits.
    Called as a module, so that hooks that wait for its weight (overlap_parameters) see it."""

    chunk: int | None = None  # positions of a chunk; None: `chunk_rows`
    kernels: ModuleType | None = None
    softcap: float | None = None  # bounds the logits: c * tanh(logit / c)

    @classmethod
    def adopt(cls, layer: mcore.ColumnParallelLinear, chunk: int | None, kernels: ModuleType | None,
              softcap: float | None = None, with_bias: bool = False) -> None:
        """Turn the output layer that a GPTModel has made into a Head, its weight and all."""
        layer.__class__ = cls
        layer.chunk, layer.kernels, layer.softcap = chunk, kernels, softcap
        if with_bias:
            layer.bias = torch.nn.Parameter(torch.zeros(
                layer.output_size_per_partition, device=device(), dtype=layer.config.params_dtype))
            mcore.set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)
        # A few selected rows come in, not this rank's slice of the sequence: gathered before they were selected.
        layer.sequence_parallel = False
        layer.allreduce_dgrad = layer.tp_group.size() > 1

    def forward(self, rows, weight=None, labels_N=None, vocabulary_size: int = 0, weights_N=None, **options):
        """rows [N, 1, H] -> (logits [N, 1, V], None); with labels: rows [N, H] -> (summed loss, losses [N]).
        weights_N: of the losses in their sum, None where each is 1."""
        if labels_N is None:
            logits, bias = super().forward(rows, weight=weight, **options)
            return (logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap), bias
        if self.allreduce_dgrad:
            rows = mcore.tensor_parallel.copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        return linear_cross_entropy(rows, self.weight if weight is None else weight, labels_N, vocabulary_size,
                                    self.tp_group, self.chunk, self.kernels, weights_N, self.bias, self.softcap)


class DenseHead(torch.nn.Module):
    """norm(gelu(dense(rows))) of labelled positions, [N, H] -> [N, H], before the output matrix (BERT's prediction
    head, arXiv 1810.04805; without biases as in ModernBERT). Each tensor rank has all of it and computes the same
    rows, whose gradients are whole on each: nothing is summed over them, sequence parallelism or not."""

    def __init__(self, config, norm: type):
        super().__init__()
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False, device=device(),
                                     dtype=config.params_dtype)
        self.norm = norm(config, config.hidden_size)
        self.norm.weight.sequence_parallel = False

    def forward(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """The rows that the output matrix reads."""
        return self.norm(F.gelu(self.dense(rows_NH)))


def chunk_rows(columns: int, device: str, width: int = 4) -> int:
    """Positions of a chunk, a multiple of 64, whose logits over `columns`, of `width` bytes, stay within the device's
    budget."""
    return max(64, _CHUNK_BYTES[device] // (width * columns) // 64 * 64)


def linear_cross_entropy(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor,
                         vocabulary_size: int, group: dist.ProcessGroup, chunk: int | None = None,
                         kernels: ModuleType | None = None, weights_N: torch.Tensor | None = None,
                         bias_V: torch.Tensor | None = None,
                         softcap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `hidden_NH @ weight_VH.T`, plus `bias_V` where there is one: its sum, a scalar with gradients,
    and each position's [N], without. In fp32 (fp64 for fp64 inputs). weight_VH, bias_V: this rank's rows of the table;
    ranks of `group` hold equal parts in order. labels_N: global ids below `vocabulary_size`; N may be 0. chunk:
    positions whose logits exist at a time. kernels: `model/kernels.py`, to make the passes over them (not in fp64).
    weights_N: of each loss in the sum (None: 1), not in the losses [N]. softcap: bounds the logits, without kernels.
    The gradient of `hidden_NH` is that of this rank's columns."""
    kernels = None if hidden_NH.dtype == torch.float64 or softcap else kernels
    width = hidden_NH.element_size() if kernels else 4  # kernels work in the memory of the product, others in fp32
    rows = chunk or chunk_rows(weight_VH.shape[0], weight_VH.device.type, width)
    wanted = tuple(torch.is_grad_enabled() and one is not None and one.requires_grad
                   for one in (hidden_NH, weight_VH, bias_V))
    return _LinearCrossEntropy.apply(hidden_NH, weight_VH, bias_V, labels_N, vocabulary_size, group, rows, kernels,
                                     wanted, weights_N, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden_NH, weight_VH, bias_V, labels_N, vocabulary_size, group, rows, kernels, wanted,
                weights_N, softcap):
        first = dist.get_rank(group) * weight_VH.shape[0]
        real = min(max(vocabulary_size - first, 0), weight_VH.shape[0])
        chunk_of = functools.partial(*((_chunk_by_kernels, kernels) if kernels else (_chunk, softcap)))
        precision = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        losses_N = torch.empty(len(labels_N), dtype=precision, device=hidden_NH.device)
        single = 0 < len(labels_N) <= rows  # else the weight's gradient is a sum over chunks, in fp32 or more
        of_hidden, of_weight, of_bias = wanted
        hidden_gradient_NH = torch.empty_like(hidden_NH) if of_hidden else None
        weight_gradient_VH = torch.zeros_like(weight_VH, dtype=precision) if of_weight and not single else None
        bias_gradient_V = torch.zeros_like(bias_V, dtype=precision) if of_bias else None
        for start in range(0, len(labels_N), rows):
            hidden_CH = hidden_NH[start : start + rows]
            local_C = labels_N[start : start + rows] - first
            here_C = (local_C >= 0) & (local_C < real)
            losses_N[start : start + rows], gradient = chunk_of(
                _logits(hidden_CH, weight_VH, bias_V), local_C.masked_fill(~here_C, 0), here_C, real, group)
            weights_C = None if weights_N is None else weights_N[start : start + rows]
            gradient_CV = gradient(weights_C) if any(wanted) else None
            if of_hidden:
                torch.mm(gradient_CV, weight_VH, out=hidden_gradient_NH[start : start + rows])
            if of_weight and single:
                weight_gradient_VH = gradient_CV.T @ hidden_CH
            elif of_weight:
                _add_product(weight_gradient_VH, gradient_CV.T, hidden_CH)
            if of_bias:
                bias_gradient_V += gradient_CV.sum(dim=0, dtype=precision)
            del gradient, gradient_CV  # and the logits in them
        context.save_for_backward(hidden_gradient_NH, weight_gradient_VH.to(weight_VH.dtype) if of_weight else None,
                                  bias_gradient_V.to(bias_V.dtype) if of_bias else None)
        context.mark_non_differentiable(losses_N)
        return (losses_N if weights_N is None else losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(context, scale, _losses):
        # made for this call: used once, in place
        return (*(None if one is None else one.mul_(scale) for one in context.saved_tensors), *(None,) * 8)


def _logits(hidden_CH, weight_VH, bias_V):
    return hidden_CH @ weight_VH.T if bias_V is None else torch.addmm(bias_V, hidden_CH, weight_VH.T)


def _chunk(softcap: float | None, logits_CV, label_C, here_C, real: int, group):
    """(losses [C], function that makes the gradient [C, V] of their sum, weighted by its argument [C] or None): label_C
    counts this rank's columns, and here_C is true where the label is one of the `real` ones. All in the memory of the
    logits, or of one fp32 copy; with a softcap of two more."""
    dtype, slope_CV = logits_CV.dtype, None
    scores_CV = logits_CV if dtype in (torch.float32, torch.float64) else logits_CV.float()
    if softcap is not None:
        turned_CV = scores_CV.div_(softcap).tanh_()
        slope_CV, scores_CV = 1 - turned_CV.square(), turned_CV.mul_(softcap)
    scores_CV[:, real:] = float("-inf")
    scores_CV.sub_(_over_ranks(scores_CV.amax(dim=1), dist.ReduceOp.MAX, group)[:, None])
    own_C = scores_CV.gather(1, label_C[:, None])[:, 0].masked_fill(~here_C, 0.0)
    exponentials_CV = scores_CV.exp_()
    total_C, own_C = _over_ranks(torch.stack((exponentials_CV.sum(dim=1), own_C)), dist.ReduceOp.SUM, group)

    def gradient(weights_C):
        gradient_CV = exponentials_CV.mul_(total_C.reciprocal()[:, None])
        minus_C = -here_C.to(gradient_CV.dtype)
        gradient_CV.scatter_add_(1, label_C[:, None], minus_C[:, None])
        if slope_CV is not None:
            gradient_CV.mul_(slope_CV)
        return (gradient_CV if weights_C is None else gradient_CV.mul_(weights_C[:, None])).to(dtype)

    return total_C.log() - own_C, gradient


def _chunk_by_kernels(kernels, logits_CV, label_C, here_C, real: int, group):
    """The same in two passes over the logits as they come from the product: a GPU then moves a fifth of the bytes."""
    local_C, total_C, own_C = kernels.row_statistics(logits_CV, label_C, here_C, real)
    maximum_C = local_C
    if dist.get_world_size(group) > 1:
        maximum_C = _over_ranks(local_C.clone(), dist.ReduceOp.MAX, group)
        total_C = total_C * (local_C - maximum_C).exp()
    total_C, own_C = _over_ranks(torch.stack((total_C, own_C - maximum_C * here_C)), dist.ReduceOp.SUM, group)
    return total_C.log() - own_C, lambda weights_C: kernels.logits_gradient_(
        logits_CV, maximum_C, total_C, label_C, here_C, real, weights_C)


def _over_ranks(values, operation, group):
    """Reduced in place over the tensor group."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, operation, group=group)
    return values


def _add_product(total, one, other) -> None:
    """total += one @ other, where `total` may be more precise than they are."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    elif mixed_products_work(one.device.type, one.dtype):
        torch.addmm(total, one, other, out_dtype=torch.float32, out=total)
    else:
        total += one @ other


@functools.cache
def mixed_products_work(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of `dtype` matrices to an fp32 one without rounding it first (CUDA only)."""
    if device != "cuda":
        return False
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
