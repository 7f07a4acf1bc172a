"""megatron.core's DDP and DistributedOptimizer around the trunk, at every size, GPU or CPU.

    1. `wrap(trunk)`              gradient buffers, reduction over data-parallel ranks (fp32)
    2. `build_optimizer(ddp)`     AdamW with fp32 masters split over data-parallel ranks; decay on every parameter
    3. `set_learning_rate`, `reset_moments`, `restore`

Without Transformer Engine or Apex the inner optimizer is torch's AdamW, whose `step` lives with each parameter;
megatron.core expects it in the parameter group. `_adopt_torch_adam` bridges the two.
"""

import types

import torch

from megatron_encdec.engine.config import OptimizerSettings
from megatron_encdec.model.trunk import Trunk
from megatron_encdec.platform import megatron as mcore


def wrap(trunk: Trunk) -> torch.nn.Module:
    """The trunk in megatron.core's DistributedDataParallel."""
    settings = mcore.DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    ddp = mcore.DistributedDataParallel(trunk.config, settings, trunk)
    trunk.config.finalize_model_grads_func = mcore.finalize_model_grads
    return ddp


def build_optimizer(ddp: torch.nn.Module, settings: OptimizerSettings):
    """megatron.core's optimizer over the parameters of `ddp`; its state exists from the start."""
    optimizer = mcore.get_megatron_optimizer(
        mcore.OptimizerConfig(
            optimizer="adam", lr=settings.lr, adam_beta1=settings.betas[0], adam_beta2=settings.betas[1],
            adam_eps=settings.eps, weight_decay=settings.weight_decay, clip_grad=settings.clip_grad,
            bf16=ddp.config.bf16, params_dtype=ddp.config.params_dtype, use_distributed_optimizer=True),
        [ddp], config_overrides={})  # no overrides: norm weights decay too, as in the paper
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _adopt_torch_adam(part)
    ddp.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _adopt_torch_adam(part) -> None:
    """Let a DistributedOptimizer hold torch's AdamW: state from the start, `step` kept apart when loading."""
    adam = part.optimizer
    for group in adam.param_groups:
        group["fused"] = True
        group["foreach"] = False
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def set_states(self, model_parameter, tensors):
        group, order = self.model_param_group_index_map[model_parameter]
        main = self.optimizer.param_groups[group]["params"][order]
        main.copy_(tensors["param"])
        for name in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[main][name].copy_(tensors[name])

    part._set_main_param_and_optimizer_states = types.MethodType(torch.no_grad()(set_states), part)


def restore(optimizer, state: dict) -> None:
    """Load a state from `dist_checkpointing.load`."""
    optimizer.load_state_dict(state)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for values in part.optimizer.state.values():
                values["step"] = values["step"].clone()  # loaded as one tensor that all would advance


def reset_moments(optimizer) -> None:
    """Forget Adam's moments and step count; weights and fp32 masters stay (`optimizer_state: reset`)."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0
        for values in part.optimizer.state.values():
            for value in values.values():
                value.zero_()


def set_learning_rate(optimizer, value: float) -> None:
    """Use `value` in the next update."""
    for group in optimizer.param_groups:
        group["lr"] = value
