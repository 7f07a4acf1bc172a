"""Layer specs: which classes a transformer layer is made of.

    torch                torch's norms and attention around megatron.core's parallel linear layers: CPU and GPU
    transformer_engine   fused norm + linear, packed attention kernels, FP8: where Transformer Engine is there. Its
                         LayerNorm always has a bias, so trunks with one have torch's before a plain linear layer

Both give a layer the same parameter names in a checkpoint, so one loads what the other wrote.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x):
        """Of the last dimension. Zero-centred, as in Gemma: times 1 + weight, which is taken in fp32."""
        if not self.zero_centered:
            return super().forward(x)
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.normalized_shape, 1 + self.weight.to(precise), self.eps).to(x.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """torch's, without a bias; the same, but never zero-centred."""

    def __init__(self, config, hidden_size, eps=None, **_unused):
        super().__init__(hidden_size, config.layernorm_epsilon if eps is None else eps, bias=False, device=device(),
                         dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class HeadsNorm(torch.nn.Module):
    """RMSNorm over all heads together of queries or keys [..., heads, D] (OLMo 2, arXiv 2501.00656). A tensor rank has
    its heads' weights, in order, and the squares of all ranks."""

    def __init__(self, config, hidden_size, heads: int, eps=None, **_unused):
        super().__init__()
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.width, local = heads * hidden_size, heads // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(local * hidden_size, device=device(), dtype=config.params_dtype))
        mcore.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x):
        """x as it came, normed in fp32 or more."""
        rows = x.flatten(-2).to(torch.promote_types(x.dtype, torch.float32))
        squares = mcore.sum_over_tensor_ranks(rows.square().sum(-1, keepdim=True))
        weight = self.weight.to(rows.dtype) + self.zero_centered
        return (rows * torch.rsqrt(squares / self.width + self.eps) * weight).to(x.dtype).view(x.shape)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """For megatron.core's checkpoints: cut as the heads are."""
        return mcore.make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix,
                                                         {"weight": 0}, sharded_offsets)


class Sum(torch.nn.Module):
    """What a layer's attention or MLP gives, added to the trunk: behind a norm (OLMo 2, Gemma), times a factor
    (Granite). In the place of megatron.core's bias, dropout and sum; there is no dropout."""

    def __init__(self, config, norm: type | None, multiplier: float | None):
        super().__init__()
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon) if norm else None
        self.multiplier = 1.0 if multiplier is None else multiplier

    def forward(self, _training: bool, _fused: bool):
        """The function ((output, bias or None), residual, dropout) -> their sum, all [.., H]."""
        return self._add

    def _add(self, output_with_bias, residual, _dropout):
        output, bias = output_with_bias
        output = output if bias is None else output + bias
        output = output if self.norm is None else self.norm(output)
        return torch.add(residual, output, alpha=self.multiplier)


def with_bias(linear: type) -> type:
    """The linear layer's class with a bias, whatever megatron.core asks for."""
    class Biased(linear):
        def __init__(self, *arguments, bias, **settings):
            super().__init__(*arguments, bias=True, **settings)

    return Biased


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


def block_spec(layers: str, num_layers: int, model: ModelConfig, first_stage: bool,
               config: mcore.TransformerConfig) -> mcore.TransformerBlockSubmodules:
    """Spec of `num_layers` layers, a pipeline stage's, and the final norm; `layers` is "torch" or "transformer_engine".
    With model.qk_norm queries and keys are normed before they are rotated (Qwen3, arXiv 2505.09388)."""
    norm = NORMS[model.norm]
    parts = parts_of(layers, norm)
    # what attention and MLP begin with
    entry = (parts.before, parts.column) if model.norm_place != "after" else (mcore.IdentityOp, parts.plain)
    q_norm, k_norm = _norms_of_heads(model, parts)
    attention = parts.attention
    if model.attention_softcap:
        attention = mcore.ModuleSpec(module=attention, params={"softcap": model.attention_softcap})
    out = with_bias(parts.row) if model.attention_output_bias else parts.row
    total = mcore.get_bias_dropout_add
    if model.norm_place != "before" or model.residual_multiplier is not None:
        total = mcore.ModuleSpec(module=Sum, params={
            "config": config, "norm": parts.norm if model.norm_place != "before" else None,
            "multiplier": model.residual_multiplier})

    def layer(before: type, column: type, **module) -> mcore.ModuleSpec:
        self_attention = mcore.ModuleSpec(
            module=mcore.SelfAttention,
            params={"attn_mask_type": mcore.AttnMaskType.no_mask},  # never read: the kind is in AttentionContext
            submodules=mcore.SelfAttentionSubmodules(
                linear_qkv=column, core_attention=attention, linear_proj=out, q_layernorm=q_norm, k_layernorm=k_norm))
        mlp = mcore.ModuleSpec(module=mcore.MLP,
                               submodules=mcore.MLPSubmodules(linear_fc1=entry[1], linear_fc2=parts.row))
        return mcore.ModuleSpec(
            **module or {"module": mcore.TransformerLayer},
            submodules=mcore.TransformerLayerSubmodules(
                input_layernorm=before, self_attention=self_attention, self_attn_bda=total,
                pre_mlp_layernorm=entry[0], mlp=mlp, mlp_bda=total, sharded_state_dict_keys_map=TORCH_KEYS))

    specs = [layer(*entry)] * num_layers
    if model.embedding_norm and first_stage:
        specs[0] = layer(mcore.IdentityOp, parts.plain, module=FirstLayer, params={"norm": norm})
    return mcore.TransformerBlockSubmodules(layer_specs=specs, layer_norm=parts.norm)


def _norms_of_heads(model: ModelConfig, parts: Parts) -> tuple:
    """Of queries and of keys."""
    if not model.qk_norm:
        return mcore.IdentityOp, mcore.IdentityOp
    if model.qk_norm_over == "head":
        return parts.norm, parts.norm
    return tuple(mcore.ModuleSpec(module=HeadsNorm, params={"heads": heads})
                 for heads in (model.num_attention_heads, model.num_query_groups))
