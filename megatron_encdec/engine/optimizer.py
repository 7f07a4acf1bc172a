"""megatron.core's DDP and DistributedOptimizer around the trunk, at every size, GPU or CPU.

    1. `wrap(trunk)`              gradient buffers, reduction over data-parallel ranks (fp32); `whole_parameters`
    2. `build_optimizer(ddp)`     AdamW (or stable_adamw.py) with fp32 masters split over data-parallel ranks
    3. `set_learning_rate`, `gradient_norm`, `update`; `nonfinite_gradients` where no update is made
    4. `freeze(...)`              which parameters stay as they are
    5. `local_states`, `update_count`, `set_update_count`, `reset_moments`     the state, in place

Without Transformer Engine or Apex the inner optimizer is torch's AdamW, whose `step` lives with each parameter;
megatron.core expects it in the parameter group. Both have their state from the start.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_encdec.engine.config import OptimizerSettings
from megatron_encdec.engine.stable_adamw import StableAdamW
from megatron_encdec.model.parts import Frozen, places
from megatron_encdec.model.trunk import Trunk
from megatron_encdec.platform import megatron as mcore


def wrap(trunk: Trunk, overlap_gradients: bool = False, overlap_parameters: bool = False) -> torch.nn.Module:
    """The trunk in megatron.core's DistributedDataParallel.
    overlap_gradients: each bucket of gradients is reduced while the backward pass goes on to the next;
    overlap_parameters: updated weights are gathered while the next forward pass begins (`whole_parameters`)."""
    settings = mcore.DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=overlap_gradients,
        overlap_param_gather=overlap_gradients and overlap_parameters)
    ddp = mcore.DistributedDataParallel(trunk.config, settings, trunk)
    trunk.config.finalize_model_grads_func = mcore.finalize_model_grads
    if overlap_gradients:
        trunk.config.no_sync_func = ddp.no_sync  # all micro-batches but the last: nothing is reduced yet
    return ddp


def whole_parameters(ddp: torch.nn.Module) -> None:
    """Every rank has every updated weight when this returns; collective. Before anything but training reads them."""
    if ddp.ddp_config.overlap_param_gather:
        ddp.start_param_sync(force_sync=True)


def build_optimizer(ddp: torch.nn.Module, settings: OptimizerSettings):
    """megatron.core's optimizer over the parameters of `ddp`; its state exists from the start. Collective.
    Parameters of the kinds in `settings.no_decay` are a second group of it, with a weight decay of 0."""
    exempt = [place.parameter for place in places(mcore.unwrap_model(ddp)) if place.kind in settings.no_decay]
    optimizer = mcore.get_megatron_optimizer(
        mcore.OptimizerConfig(
            optimizer="adam", lr=settings.lr, adam_beta1=settings.betas[0], adam_beta2=settings.betas[1],
            adam_eps=settings.eps, weight_decay=settings.weight_decay, clip_grad=settings.clip_grad,
            bf16=ddp.config.bf16, params_dtype=ddp.config.params_dtype, use_distributed_optimizer=True,
            overlap_param_gather=ddp.ddp_config.overlap_param_gather),
        [ddp], config_overrides=mcore.without_decay(exempt) if settings.no_decay else {})  # None: mcore's own choice
    for part in optimizer.chained_optimizers:
        _begin(part.optimizer)
    if settings.name == "stable_adamw":
        _stabilise(optimizer, mcore.unwrap_model(ddp))
    optimizer.frozen, optimizer.frozen_shards = Frozen(), []
    optimizer.counted_here = settings.name == "stable_adamw" or bool(settings.no_decay)
    ddp.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _begin(adam: torch.optim.Optimizer) -> None:
    """Moments of zero, as the first update would make them, so that a state can be saved and loaded before it."""
    is_torch = isinstance(adam, torch.optim.AdamW)  # the others: FusedAdam of Transformer Engine or Apex
    for group in adam.param_groups:
        if is_torch:
            group["fused"] = True
            group["foreach"] = False
        else:
            group.setdefault("step", 0)
        for parameter in group["params"]:
            state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            if is_torch:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            adam.state[parameter] = state


def freeze(ddp: torch.nn.Module, optimizer, frozen: Frozen) -> None:
    """From now on `frozen`, and nothing else, stays as it is: weights, fp32 masters and moments, to the bit. Its
    gradients are no part of the norm; they are not computed either, but for overlap_gradients, where a bucket is
    reduced when all of its gradients are there. The update count goes on for all."""
    if optimizer.frozen == frozen:
        return
    trunk, states = mcore.unwrap_model(ddp), local_states(optimizer)
    optimizer.frozen, optimizer.frozen_shards = frozen, []
    for place in places(trunk):
        held = frozen.holds(place, trunk.model.num_layers)
        if not ddp.ddp_config.overlap_grad_reduce:
            place.parameter.requires_grad_(not held)
        if held and (state := states[place.parameter]) is not None:
            optimizer.frozen_shards.append(state.tensors["param"])


def _stabilise(optimizer, trunk: Trunk) -> None:
    """Let the inner optimizers update as StableAdamW does."""
    names, states = {place.parameter: place.name for place in places(trunk)}, local_states(optimizer)
    for part in optimizer.chained_optimizers:
        mine = {shard for group in part.optimizer.param_groups for shard in group["params"]}
        stable = StableAdamW(part.optimizer, {
            state.tensors["param"]: names[parameter] for parameter, state in states.items()
            if state is not None and state.tensors["param"] in mine})
        part.optimizer.step = lambda stable=stable: stable.update(update_count(optimizer) + 1)


@dataclass(frozen=True)
class LocalState:
    """This rank's range [start, stop) of a flattened parameter: fp32 master and moments, live, by name."""

    start: int
    stop: int
    tensors: dict[str, torch.Tensor]  # param, exp_avg, exp_avg_sq, each of stop - start elements


def _parts(optimizer) -> list:
    """megatron.core's DistributedOptimizers in `optimizer`, which may be None."""
    return [] if optimizer is None else optimizer.chained_optimizers


def local_states(optimizer) -> dict[torch.Tensor, LocalState | None]:
    """By parameter; None where the optimizer knows it but other data-parallel ranks hold all of its state."""
    states = {}
    for part in _parts(optimizer):
        for buffer, by_dtype in zip(part.buffers, part.gbuf_ranges, strict=True):
            states |= dict.fromkeys(buffer.param_index_map)
            for buckets in by_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        tensors = part._get_main_param_and_optimizer_states(parameter)
                        states[parameter] = LocalState(ranges["param"].start, ranges["param"].end, {
                            name: tensors[name] for name in ("param", "exp_avg", "exp_avg_sq")})
    return states


def update_count(optimizer) -> int:
    """Updates since the moments were zero: Adam's bias correction depends on it."""
    return int(next(_counters(optimizer), {"step": 0})["step"])


def set_update_count(optimizer, count: int) -> None:
    """Continue as after `count` updates."""
    for holder in _counters(optimizer):
        if isinstance(holder["step"], torch.Tensor):
            holder["step"].fill_(count)
        else:
            holder["step"] = count


def _counters(optimizer) -> Iterator[dict]:
    """The dictionaries that count updates under `step`: of each parameter's state, or of the parameter groups."""
    for part in _parts(optimizer):
        yield from (holder for holder in (*part.optimizer.state.values(), *part.optimizer.param_groups)
                    if "step" in holder)


def reset_moments(optimizer) -> None:
    """Forget Adam's moments and step count; weights and fp32 masters stay (`optimizer_state: reset`)."""
    set_update_count(optimizer, 0)
    for part in _parts(optimizer):
        for values in part.optimizer.state.values():
            for value in values.values():
                value.zero_()


@torch.no_grad()
def gradient_norm(optimizer) -> float:
    """The norm of the reduced gradients, which `update` takes over; the first part of megatron.core's `step`."""
    optimizer.prepare_grads()
    for shard in optimizer.frozen_shards:
        shard.grad = None
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def update(optimizer, norm: float) -> None:
    """Clip by `norm`, that of `gradient_norm`, and update: the rest of `step`. Without it nothing has changed.
    The count is one for all, and kept here where torch's AdamW would not count for a parameter without a gradient, or
    FusedAdam for a group without a parameter."""
    count = update_count(optimizer) if optimizer.counted_here or optimizer.frozen else None
    for part in optimizer.chained_optimizers:
        parameters = [parameter for parameter in part.get_parameters() if parameter.grad is not None]
        if part.config.clip_grad > 0.0 and parameters:
            mcore.clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    if count is not None:
        set_update_count(optimizer, count + 1)


@torch.no_grad()
def nonfinite_gradients(trunk: Trunk, optimizer) -> list[tuple[str, bool]]:
    """Names of the parameters whose gradient is not finite on this rank, in the order of the forward pass; and whether
    its own backward pass made it so: then it shows outside this rank's range of the parameter, where the buffer still
    holds what it computed. Inside stands the sum over the data-parallel ranks."""
    found, states = [], local_states(optimizer)
    for name, parameter in trunk.named_parameters():
        bad = ~torch.isfinite(parameter.main_grad.reshape(-1))
        if count := int(bad.sum()):
            state = states.get(parameter)
            found.append((name, state is None or count > int(bad[state.start : state.stop].sum())))
    return found


def set_learning_rate(optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
