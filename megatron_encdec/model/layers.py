"""Layer specs: which classes a transformer layer is made of.

    torch                `RMSNorm` and torch's attention around megatron.core's parallel linear layers: CPU and GPU
    transformer_engine   fused norm + linear, packed attention kernels, FP8: where Transformer Engine is there

Both give a layer the same parameter names in a checkpoint, so one loads what the other wrote.
"""

from dataclasses import dataclass

import torch

from megatron_encdec.model.attention import TorchAttention, transformer_engine_attention
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device


class RMSNorm(torch.nn.RMSNorm):
    """torch's; the gradient of its weight is summed over tensor ranks under sequence parallelism."""

    def __init__(self, config, hidden_size, eps=None, **_unused):
        super().__init__(hidden_size, config.layernorm_epsilon if eps is None else eps, device=device(),
                         dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


@dataclass(frozen=True)
class Parts:
    """What a layer is made of. column, row: its first and second linear layers. before: the norm before a `column`,
    `IdentityOp` where `column` holds it. names: where a checkpoint keeps this layer's parameters under other names."""

    norm: type
    before: type
    column: type
    row: type
    attention: type
    names: dict[str, str]


# Transformer Engine keeps a norm inside the linear layer after it: ours are stored under its names.
TORCH_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_",
              "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
TORCH = Parts(RMSNorm, RMSNorm, mcore.ColumnParallelLinear, mcore.RowParallelLinear, TorchAttention, TORCH_KEYS)


def block_spec(layers: str, num_layers: int, qk_norm: bool = False) -> mcore.TransformerBlockSubmodules:
    """Spec of `num_layers` layers and the final norm; `layers` is "torch" or "transformer_engine".
    qk_norm: each head's queries and keys are normed before they are rotated (Qwen3, arXiv 2505.09388)."""
    parts = TORCH
    if layers == "transformer_engine":
        te = mcore.transformer_engine_modules()
        parts = Parts(te.TENorm, mcore.IdentityOp, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear,
                      transformer_engine_attention(), {})
    head_norm = parts.norm if qk_norm else mcore.IdentityOp
    attention = mcore.ModuleSpec(
        module=mcore.SelfAttention,
        params={"attn_mask_type": mcore.AttnMaskType.no_mask},  # never read: the kind is in AttentionContext
        submodules=mcore.SelfAttentionSubmodules(
            linear_qkv=parts.column, core_attention=parts.attention, linear_proj=parts.row,
            q_layernorm=head_norm, k_layernorm=head_norm))
    mlp = mcore.ModuleSpec(module=mcore.MLP,
                           submodules=mcore.MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row))
    layer = mcore.ModuleSpec(
        module=mcore.TransformerLayer,
        submodules=mcore.TransformerLayerSubmodules(
            input_layernorm=parts.before, self_attention=attention, self_attn_bda=mcore.get_bias_dropout_add,
            pre_mlp_layernorm=parts.before, mlp=mlp, mlp_bda=mcore.get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.names))
    return mcore.TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=parts.norm)
