"""The head's loss: cross-entropy over a vocabulary that is split over tensor-parallel ranks.

    1. every rank has the logits of its part of the (padded) vocabulary, for the labelled positions only
    2. maximum, sum of exponentials and the label's own logit are reduced over the tensor group
    3. columns beyond the real vocabulary take no part: their probability is 0, and so is their gradient

Shape suffixes: N labelled positions, V this rank's vocabulary columns.
"""

import torch
import torch.distributed as dist


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context, logits_NV, labels_N, first_column, vocabulary_size, group):
        scores_NV = logits_NV.float()  # in fp32 the logits themselves: nothing reads them again
        real = min(max(vocabulary_size - first_column, 0), scores_NV.shape[1])
        scores_NV[:, real:] = float("-inf")
        parallel = dist.get_world_size(group) > 1

        maximum_N = scores_NV.amax(dim=1)
        if parallel:
            dist.all_reduce(maximum_N, dist.ReduceOp.MAX, group=group)
        scores_NV.sub_(maximum_N[:, None])

        local_N = labels_N - first_column
        here_N = (local_N >= 0) & (local_N < real)
        local_N = local_N.masked_fill(~here_N, 0)
        own_N = scores_NV.gather(1, local_N[:, None])[:, 0].masked_fill(~here_N, 0.0)
        exponentials_NV = scores_NV.exp_()
        sums_2N = torch.stack((exponentials_NV.sum(dim=1), own_N))
        if parallel:
            dist.all_reduce(sums_2N, group=group)
        total_N, own_N = sums_2N

        context.save_for_backward(exponentials_NV, total_N, local_N, here_N)
        context.dtype = logits_NV.dtype
        return total_N.log() - own_N

    @staticmethod
    def backward(context, gradient_N):
        exponentials_NV, total_N, local_N, here_N = context.saved_tensors
        gradient_NV = exponentials_NV.mul_((gradient_N / total_N)[:, None])  # in place: used once
        gradient_NV.scatter_add_(1, local_N[:, None], -(gradient_N * here_N)[:, None])
        return gradient_NV.to(context.dtype), None, None, None, None


def vocabulary_parallel_cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor, vocabulary_size: int,
                                      group: dist.ProcessGroup) -> torch.Tensor:
    """Loss per labelled position [N], fp32. Overwrites fp32 logits: [N, V] is the largest tensor of a step.

    logits_NV: this rank's columns; ranks of `group` hold equal parts in order.
    labels_N: global ids, each below `vocabulary_size`; columns from `vocabulary_size` on are padding.
    """
    first_column = dist.get_rank(group) * logits_NV.shape[1]
    return _VocabularyParallelCrossEntropy.apply(logits_NV, labels_N, first_column, vocabulary_size, group)
