"""Layer specs: which classes a transformer layer is made of.

    torch                torch's norms and attention around megatron.core's parallel linear layers: CPU and GPU
    transformer_engine   fused norm + linear, packed attention kernels, FP8: where Transformer Engine is there. Its
                         LayerNorm always has a bias, so trunks with one have torch's before a plain linear layer

Both give a layer the same parameter names in a checkpoint, so one loads what the other wrote.
"""

from dataclasses import dataclass

import torch

from megatron_encdec.model.attention import TorchAttention, transformer_engine_attention
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device


class RMSNorm(torch.nn.RMSNorm):
    """torch's; the gradient of its weight is summed over tensor ranks under sequence parallelism."""

    def __init__(self, config, hidden_size, eps=None, **_unused):
        super().__init__(hidden_size, config.layernorm_epsilon if eps is None else eps, device=device(),
                         dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """torch's, without a bias; the same."""

    def __init__(self, config, hidden_size, eps=None, **_unused):
        super().__init__(hidden_size, config.layernorm_epsilon if eps is None else eps, bias=False, device=device(),
                         dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
# Transformer Engine keeps a norm inside the linear layer after it: ours are stored under its names. The embeddings'
# norm has the place of the one that the first layer does without: none is missing in a checkpoint's stack of layers.
TORCH_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_",
              "embedding_norm.": "self_attention.linear_qkv.layer_norm_",
              "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


class FirstLayer(mcore.TransformerLayer):
    """The first layer of a trunk whose embeddings are normed (ModernBERT, arXiv 2412.13663): what it begins with, and
    what goes around its attention and MLP, is normed then, so its attention has no norm before it."""

    def __init__(self, config, submodules, norm: type, **settings):
        super().__init__(config, submodules, **settings)
        self.embedding_norm = norm(config, config.hidden_size)

    def forward(self, hidden_states, *arguments, **options):
        """As of other layers."""
        return super().forward(self.embedding_norm(hidden_states), *arguments, **options)


@dataclass(frozen=True)
class Parts:
    """What a layer is made of. column, row: its first and second linear layers. before: the norm before a `column`,
    `IdentityOp` where `column` holds it. plain: a `column` that holds none."""

    norm: type
    before: type
    column: type
    plain: type
    row: type
    attention: type


def parts_of(layers: str, norm: type) -> Parts:
    """Of "torch" or "transformer_engine" layers with norms of that class."""
    if layers != "transformer_engine":
        column = mcore.ColumnParallelLinear
        return Parts(norm, norm, column, column, mcore.RowParallelLinear, TorchAttention)
    te = mcore.transformer_engine_modules()
    column, row, attention = te.TEColumnParallelLinear, te.TERowParallelLinear, transformer_engine_attention()
    if norm is LayerNorm:
        return Parts(norm, norm, column, column, row, attention)
    return Parts(te.TENorm, mcore.IdentityOp, te.TELayerNormColumnParallelLinear, column, row, attention)


def block_spec(layers: str, num_layers: int, model: ModelConfig, first_stage: bool) -> mcore.TransformerBlockSubmodules:
    """Spec of `num_layers` layers, a pipeline stage's, and the final norm; `layers` is "torch" or "transformer_engine".
    With model.qk_norm each head's queries and keys are normed before they are rotated (Qwen3, arXiv 2505.09388)."""
    norm = NORMS[model.norm]
    parts = parts_of(layers, norm)
    head_norm = parts.norm if model.qk_norm else mcore.IdentityOp

    def layer(before: type, column: type, **module) -> mcore.ModuleSpec:
        attention = mcore.ModuleSpec(
            module=mcore.SelfAttention,
            params={"attn_mask_type": mcore.AttnMaskType.no_mask},  # never read: the kind is in AttentionContext
            submodules=mcore.SelfAttentionSubmodules(
                linear_qkv=column, core_attention=parts.attention, linear_proj=parts.row,
                q_layernorm=head_norm, k_layernorm=head_norm))
        mlp = mcore.ModuleSpec(module=mcore.MLP,
                               submodules=mcore.MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row))
        return mcore.ModuleSpec(
            **module or {"module": mcore.TransformerLayer},
            submodules=mcore.TransformerLayerSubmodules(
                input_layernorm=before, self_attention=attention, self_attn_bda=mcore.get_bias_dropout_add,
                pre_mlp_layernorm=parts.before, mlp=mlp, mlp_bda=mcore.get_bias_dropout_add,
                sharded_state_dict_keys_map=TORCH_KEYS))

    specs = [layer(parts.before, parts.column)] * num_layers
    if model.embedding_norm and first_stage:
        specs[0] = layer(mcore.IdentityOp, parts.plain, module=FirstLayer, params={"norm": norm})
    return mcore.TransformerBlockSubmodules(layer_specs=specs, layer_norm=parts.norm)
