"""The head: the loss of the labelled positions, a chunk of positions at a time, over a vocabulary that is split.

A vocabulary of 128 256 makes the logits the largest tensor of a step: 4 bytes x positions x vocabulary, several times
over. Nobody needs them but the loss and its gradient, and both are known as soon as a chunk's logits are: so a chunk
is computed, turned into its loss and its part of the gradients, and forgotten.

    1. `Head`                       the output layer: logits for who wants them, the loss for training
    2. `chunk_rows(...)`            how many positions a chunk holds
    3. `linear_cross_entropy(...)`  the sum of the losses; its gradients are made in the forward pass, since the sum
                                    scales them all alike, and no logits are computed twice
    4. `_Chunk` and `_compiled()`   one chunk: statistics over the tensor group, then the gradient of its logits

Columns beyond the real vocabulary take no part: their probability is 0, and so is their gradient.

Shape suffixes: N labelled positions, C positions of a chunk, H hidden size, V this rank's vocabulary columns.
"""

import functools

import torch
import torch.distributed as dist

from megatron_encdec.platform import megatron as mcore

_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}  # of fp32 logits: few enough to lose, enough to be quick
_ROWS_MULTIPLE = 64


class Head(mcore.ColumnParallelLinear):
    """megatron.core's output layer; called with labels it gives their summed loss and never all of the logits.

    A GPTModel makes its own output layer: `adopt` turns that one into this class, its weight and all.
    Called as a module, so that hooks that wait for its weight (overlap_parameters) see it.
    """

    chunk: int | None = None  # positions of a chunk; None: `chunk_rows`
    compile: bool = False

    @classmethod
    def adopt(cls, layer: mcore.ColumnParallelLinear, chunk: int | None, compile_: bool) -> None:
        """Make `layer` a Head, in place."""
        layer.__class__ = cls
        layer.chunk, layer.compile = chunk, compile_
        # A few selected rows come in, not this rank's slice of the sequence: gathered before they were selected.
        layer.sequence_parallel = False
        layer.allreduce_dgrad = layer.tp_group.size() > 1

    def forward(self, rows, weight=None, labels_N=None, vocabulary_size: int = 0, **options):
        """rows [N, 1, H] -> (logits [N, 1, V], None); with labels: rows [N, H] -> (summed loss, losses [N])."""
        if labels_N is None:
            return super().forward(rows, weight=weight, **options)
        if self.allreduce_dgrad:
            rows = mcore.tensor_parallel.copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        return linear_cross_entropy(rows, self.weight if weight is None else weight, labels_N, vocabulary_size,
                                    self.tp_group, self.chunk, self.compile)


def chunk_rows(columns: int, device: str) -> int:
    """Positions of a chunk whose fp32 logits over `columns` columns stay within a budget of the device's kind."""
    rows = _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) // (4 * columns)
    return max(_ROWS_MULTIPLE, rows // _ROWS_MULTIPLE * _ROWS_MULTIPLE)


def linear_cross_entropy(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor,
                         vocabulary_size: int, group: dist.ProcessGroup, chunk: int | None = None,
                         compile_: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `hidden_NH @ weight_VH.T`: its sum, a scalar with gradients, and each position's [N], without.

    In fp32 (fp64 for fp64 inputs). weight_VH: this rank's rows of the table; ranks of `group` hold equal parts in
    order. labels_N: global ids, each below `vocabulary_size`; N may be 0. chunk: positions whose logits exist at a
    time. compile_: the passes over a chunk's logits fused by torch.compile. The gradient of `hidden_NH` is the part
    of this rank's columns only.
    """
    rows = chunk or chunk_rows(weight_VH.shape[0], weight_VH.device.type)
    wanted = torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)
    return _LinearCrossEntropy.apply(hidden_NH, weight_VH, labels_N, vocabulary_size, group, rows, compile_, wanted)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden_NH, weight_VH, labels_N, vocabulary_size, group, rows, compile_, wanted):
        first = dist.get_rank(group) * weight_VH.shape[0]
        real = min(max(vocabulary_size - first, 0), weight_VH.shape[0])
        kind = _Compiled if compile_ else _Chunk
        precision = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        losses_N = torch.empty(len(labels_N), dtype=precision, device=hidden_NH.device)
        hidden_gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        weights = _WeightGradient(weight_VH, len(labels_N) > rows) if wanted else None
        for start in range(0, len(labels_N), rows):
            hidden_CH = hidden_NH[start : start + rows]
            part = kind(hidden_CH @ weight_VH.T, labels_N[start : start + rows] - first, real, group)
            losses_N[start : start + rows] = part.losses()
            if wanted:
                gradient_CV = part.gradient()
                torch.mm(gradient_CV, weight_VH, out=hidden_gradient_NH[start : start + rows])
                weights.add(gradient_CV, hidden_CH)
            del part
        if wanted:
            context.save_for_backward(hidden_gradient_NH, weights.total())
        context.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(context, scale, _losses):
        hidden_gradient_NH, weight_gradient_VH = context.saved_tensors  # made for this call: used once, in place
        return (hidden_gradient_NH.mul_(scale), weight_gradient_VH.mul_(scale), *(None,) * 6)


class _Chunk:
    """One chunk's logits, worked on in place: nothing else of their size is held in fp32."""

    def __init__(self, logits_CV, local_C, real: int, group):
        self.dtype, self.group, self.parallel = logits_CV.dtype, group, dist.get_world_size(group) > 1
        self.here_C = (local_C >= 0) & (local_C < real)
        self.label_C = local_C.masked_fill(~self.here_C, 0)
        self.real = real
        self._look(logits_CV)

    def _look(self, logits_CV) -> None:
        scores_CV = logits_CV if logits_CV.dtype in (torch.float32, torch.float64) else logits_CV.float()
        scores_CV[:, self.real:] = float("-inf")
        maximum_C = scores_CV.amax(dim=1)
        if self.parallel:
            dist.all_reduce(maximum_C, dist.ReduceOp.MAX, group=self.group)
        scores_CV.sub_(maximum_C[:, None])
        own_C = scores_CV.gather(1, self.label_C[:, None])[:, 0].masked_fill(~self.here_C, 0.0)
        self.exponentials_CV = scores_CV.exp_()
        sums_2C = torch.stack((self.exponentials_CV.sum(dim=1), own_C))
        if self.parallel:
            dist.all_reduce(sums_2C, group=self.group)
        self.total_C, self.own_C = sums_2C

    def losses(self):
        """Of each position."""
        return self.total_C.log() - self.own_C

    def gradient(self):
        """Of the summed loss with respect to the logits [C, V], in their dtype."""
        gradient_CV = self.exponentials_CV.mul_(self.total_C.reciprocal()[:, None])
        minus_C = -self.here_C.to(gradient_CV.dtype)
        return gradient_CV.scatter_add_(1, self.label_C[:, None], minus_C[:, None]).to(self.dtype)


class _Compiled(_Chunk):
    """The same in two fused passes over the logits as they come from the product: a GPU then moves half the bytes."""

    def _look(self, logits_CV) -> None:
        self.logits_CV = logits_CV
        statistics, _ = _compiled()
        self.maximum_C, total_C, own_C = statistics(logits_CV, self.label_C, self.here_C, self.real)
        if self.parallel:
            local_C = self.maximum_C.clone()
            dist.all_reduce(self.maximum_C, dist.ReduceOp.MAX, group=self.group)
            total_C = total_C * (local_C - self.maximum_C).exp()
        own_C = own_C - self.maximum_C * self.here_C
        sums_2C = torch.stack((total_C, own_C))
        if self.parallel:
            dist.all_reduce(sums_2C, group=self.group)
        self.total_C, self.own_C = sums_2C

    def gradient(self):
        _, gradient = _compiled()
        return gradient(self.logits_CV, self.maximum_C, self.total_C, self.label_C, self.here_C, self.real)


def _statistics(logits_CV, label_C, here_C, real: int):
    """Maximum, sum of exponentials below it and the label's own logit (0 where it is another rank's), per row."""
    scores_CV = _real_scores(logits_CV, real)
    maximum_C = scores_CV.amax(dim=1)
    above_C = torch.where(maximum_C == float("-inf"), torch.zeros_like(maximum_C), maximum_C)
    total_C = (scores_CV - above_C[:, None]).exp().sum(dim=1)
    own_C = logits_CV.gather(1, label_C[:, None])[:, 0].to(scores_CV.dtype)
    return maximum_C, total_C, torch.where(here_C, own_C, torch.zeros_like(own_C))


def _logits_gradient(logits_CV, maximum_C, total_C, label_C, here_C, real: int):
    """(probability - one at the label) in the logits' dtype."""
    probabilities_CV = (_real_scores(logits_CV, real) - maximum_C[:, None]).exp() / total_C[:, None]
    columns_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    is_label_CV = (columns_V[None] == label_C[:, None]) & here_C[:, None]
    return (probabilities_CV - is_label_CV.to(probabilities_CV.dtype)).to(logits_CV.dtype)


def _real_scores(logits_CV, real: int):
    scores_CV = logits_CV.double() if logits_CV.dtype == torch.float64 else logits_CV.float()
    columns_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    return torch.where(columns_V[None] < real, scores_CV, float("-inf"))


@functools.cache
def _compiled():
    return torch.compile(_statistics, dynamic=True), torch.compile(_logits_gradient, dynamic=True)


class _WeightGradient:
    """Sum over chunks of gradient_CV.T @ hidden_CH, in fp32 (or more) where there are several."""

    def __init__(self, weight_VH, several: bool):
        self._like, self._sum = weight_VH, None
        self._mixed = several and mixed_products_work(weight_VH.device.type, weight_VH.dtype)
        if several:
            precision = torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
            self._sum = torch.zeros(weight_VH.shape, dtype=precision, device=weight_VH.device)

    def add(self, gradient_CV, hidden_CH) -> None:
        """One more chunk."""
        if self._sum is None:
            self._sum = gradient_CV.T @ hidden_CH
        elif self._sum.dtype == gradient_CV.dtype:
            self._sum.addmm_(gradient_CV.T, hidden_CH)
        elif self._mixed:
            torch.addmm(self._sum, gradient_CV.T, hidden_CH, out_dtype=torch.float32, out=self._sum)
        else:
            self._sum += gradient_CV.T @ hidden_CH

    def total(self) -> torch.Tensor:
        """In the weight's dtype; zero where there was no label."""
        return torch.zeros_like(self._like) if self._sum is None else self._sum.to(self._like.dtype)


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
