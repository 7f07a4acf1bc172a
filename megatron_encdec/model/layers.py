"""Layer specs: which classes a transformer layer is made of.

    torch                `RMSNorm` and torch's attention, masked or packed, around megatron.core's parallel linear
                         layers: CPU and GPU
    transformer_engine   fused norm + linear, packed attention kernels, FP8: where Transformer Engine is there

Both give a layer the same parameter names in a checkpoint, so one loads what the other wrote.
"""

import torch
import torch.nn.functional as F

from megatron_encdec.model.attention import PackedTorchAttention, TorchAttention, transformer_engine_attention
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight. Its weight's gradient is summed over tensor ranks under sequence parallelism."""

    def __init__(self, config, hidden_size, eps=None, **_unused):
        super().__init__()
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        """x [..., hidden_size], same shape back."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def block_spec(layers: str, num_layers: int, qk_norm: bool = False,
               packed: bool = False) -> mcore.TransformerBlockSubmodules:
    """Spec of `num_layers` layers and the final norm; `layers` is "torch" or "transformer_engine".

    packed: the torch layers see segments laid end to end; Transformer Engine's always do.
    qk_norm: each head's queries and keys are normed before they are rotated (Qwen3, arXiv 2505.09388).
    """
    if layers == "transformer_engine":
        layer, norm = _transformer_engine_layer(qk_norm)
    else:
        layer, norm = _torch_layer(qk_norm, PackedTorchAttention if packed else TorchAttention), RMSNorm
    return mcore.TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _layer(input_norm, mlp_norm, qkv, core_attention, projection, fc1, fc2, key_map,
           head_norm=mcore.IdentityOp) -> mcore.ModuleSpec:
    attention = mcore.ModuleSpec(
        module=mcore.SelfAttention,
        params={"attn_mask_type": mcore.AttnMaskType.no_mask},  # never read: the kind is in AttentionContext
        submodules=mcore.SelfAttentionSubmodules(
            linear_qkv=qkv, core_attention=core_attention, linear_proj=projection,
            q_layernorm=head_norm, k_layernorm=head_norm))
    mlp = mcore.ModuleSpec(module=mcore.MLP,
                           submodules=mcore.MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2))
    return mcore.ModuleSpec(
        module=mcore.TransformerLayer,
        submodules=mcore.TransformerLayerSubmodules(
            input_layernorm=input_norm, self_attention=attention, self_attn_bda=mcore.get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm, mlp=mlp, mlp_bda=mcore.get_bias_dropout_add,
            sharded_state_dict_keys_map=key_map))


# Transformer Engine keeps a norm inside the linear layer after it: ours are stored under its names.
TORCH_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_",
              "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _torch_layer(qk_norm: bool, attention: type) -> mcore.ModuleSpec:
    return _layer(RMSNorm, RMSNorm, mcore.ColumnParallelLinear, attention, mcore.RowParallelLinear,
                  mcore.ColumnParallelLinear, mcore.RowParallelLinear, TORCH_KEYS,
                  RMSNorm if qk_norm else mcore.IdentityOp)


def _transformer_engine_layer(qk_norm: bool) -> tuple[mcore.ModuleSpec, type]:
    te = mcore.transformer_engine_modules()
    layer = _layer(mcore.IdentityOp, mcore.IdentityOp, te.TELayerNormColumnParallelLinear,
                   transformer_engine_attention(), te.TERowParallelLinear,
                   te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, {},
                   te.TENorm if qk_norm else mcore.IdentityOp)
    return layer, te.TENorm
