"""StableAdamW (arXiv 2304.13013, algorithm 2): AdamW whose learning rate is divided, for each parameter, by
max(1, RMS), the root of the mean of g^2 / max(v, eps^2) with v the second moment, bias-corrected, after this update.

The mean is over the whole parameter as the trunk holds it (query, key and value are one, padded rows of the vocabulary
count), however data- and tensor-parallel ranks share it: one sum over all ranks of a vector with a number for each
parameter, to which every element contributes once. So each holder of a copy divides by the very same number.
As in the paper the weight decay goes with the divided rate. State and groups are AdamW's: exp_avg, exp_avg_sq, step.

Shape suffix: P parameters of the whole trunk.
"""

import torch
import torch.distributed as dist

from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device


class StableAdamW:
    """The update of one inner optimizer, in the place of its `step`."""

    def __init__(self, adam: torch.optim.Optimizer, names: dict[torch.Tensor, str]):
        """names: of this rank's shards of parameters (what `adam` updates) in the whole trunk. Collective."""
        everyones: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, sorted(set(names.values())))
        order = {name: number for number, name in enumerate(sorted({name for some in everyones for name in some}))}
        self._groups = adam.param_groups
        self._state = adam.state
        self._places = {shard: order[name] for shard, name in names.items()}
        self._counted = {shard for shard in names if mcore.counts_once(shard)}
        sizes_P = torch.zeros(len(order), dtype=torch.float64, device=device())
        for shard in self._counted:
            sizes_P[self._places[shard]] += shard.numel()
        dist.all_reduce(sizes_P)
        self._sizes_P = sizes_P

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Update number `count` since the moments were zero; shards without a gradient stay as they are."""
        shards = [(group, shard) for group in self._groups for shard in group["params"] if shard.grad is not None]
        sums_P = torch.zeros_like(self._sizes_P)
        for group, shard in shards:
            ratios_sum = self._moments(group, shard, count)
            if shard in self._counted:
                sums_P[self._places[shard]] += ratios_sum
        dist.all_reduce(sums_P)
        divisors_P = (sums_P / self._sizes_P).sqrt().clamp(min=1.0)
        for group, shard in shards:
            rate = (group["lr"] / divisors_P[self._places[shard]]).to(shard.dtype)
            state = self._state[shard]
            denominator = (state["exp_avg_sq"] / (1 - group["betas"][1] ** count)).sqrt_().add_(group["eps"])
            step = (state["exp_avg"] / (1 - group["betas"][0] ** count)).div_(denominator)
            shard.mul_(1 - rate * group["weight_decay"]).sub_(step.mul_(rate))

    def _moments(self, group: dict, shard: torch.Tensor, count: int) -> torch.Tensor:
        """Take the gradient into the shard's moments; the sum of g^2 / max(v, eps^2), float64."""
        state, gradient, (beta1, beta2) = self._state[shard], shard.grad, group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        corrected = (state["exp_avg_sq"] / (1 - beta2 ** count)).clamp_(min=group["eps"] ** 2)
        return gradient.square().div_(corrected).sum(dtype=torch.float64)
