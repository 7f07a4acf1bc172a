"""Attention: its kind and its boundaries travel with the micro-batch, never as state on a module.

    1. `AttentionContext`       what one micro-batch carries through every layer: kind, segments, rotary angles
    2. `rotate`                 rotary position embedding of queries and keys
    3. `TorchAttention`         the torch layers', on windows: `scaled_dot_product_attention`, or explicit products
    4. `PackedTorchAttention`   the torch layers', on packed segments (THD): flash attention, or one by one on a CPU
    5. `transformer_engine_attention()`   the same on Transformer Engine's packed kernels

Shape suffixes: S window length, B windows, H heads, D head dimension, T = B * S packed tokens.
Rotary positions count from the window's start. Attention between tokens of one segment depends only on their
distance, so a segment's outputs are those it would have alone.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_encdec.objectives.base import AttentionKind
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device_type


@dataclass
class AttentionContext(mcore.PackedSeqParams):
    """One micro-batch's attention; megatron.core hands it down as `packed_seq_params`.

    cos, sin: [S, 1, 1, D/2] (torch layers) or [T, 1, D/2] (packed layers), in the compute dtype.
    mask_B1SS: additive mask, or None where the kind alone says who sees whom.
    explicit: scores are computed as a matrix ([1 or B, 1, S, S] of mask_B1SS added, causality included).
    """

    kind: AttentionKind = None
    cos: torch.Tensor = None
    sin: torch.Tensor = None
    mask_B1SS: torch.Tensor | None = None
    explicit: bool = False


def explicit_is_faster(length: int, dtype: torch.dtype) -> bool:
    """Whether two batched products beat torch's fused kernel: on a CPU in bf16, 2 to 4 times at S = 256 and 512
    (docs/performance.md); the score matrix, S * S a head, bounds the length."""
    return device_type() == "cpu" and dtype == torch.bfloat16 and length <= 1024


def segment_mask(cu_seqlens: torch.Tensor, windows: int, length: int, kind: AttentionKind,
                 dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [B, 1, S, S]: 0 inside a segment (and not ahead, if causal), -inf elsewhere.

    cu_seqlens: int32 [segments + 1], cuts of the B * S flattened tokens, 0 and B * S included.
    """
    positions_T = torch.arange(windows * length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    segment_BS = torch.bucketize(positions_T, cu_seqlens, right=True).view(windows, length)
    allowed_BSS = segment_BS[:, :, None] == segment_BS[:, None, :]
    if kind == "causal":
        allowed_BSS = allowed_BSS.tril()
    mask_BSS = torch.zeros(allowed_BSS.shape, dtype=dtype, device=cu_seqlens.device)
    return mask_BSS.masked_fill_(~allowed_BSS, float("-inf"))[:, None]


class _Rotate(torch.autograd.Function):
    """x turned by the angles; the gradient is turned back by them, so nothing but the angles is kept."""

    @staticmethod
    def forward(context, x, cos, sin):
        context.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(context, gradient):
        cos, sin = context.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate(x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """Rotary embedding of queries or keys [S, B, H, D] (or [T, H, D], packed): halves form the pairs."""
    return _Rotate.apply(x, context.cos, context.sin)


def rotates(config, layer_number: int) -> bool:
    """Whether layer `layer_number` (from 1, of the whole trunk) has rotary embeddings at all."""
    return not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])


def _explicit_attention(query_BHSD, key_BGSD, value_BGSD, mask_B1SS):
    """softmax(q k^T / sqrt(D) + mask) v, the H / G queries of a group in one product."""
    windows, heads, length, width = query_BHSD.shape
    rows = (-1, heads // key_BGSD.shape[1] * length, width)
    scores = torch.bmm((query_BHSD * width**-0.5).reshape(rows), key_BGSD.flatten(0, 1).transpose(1, 2))
    scores_BHSS = scores.view(windows, heads, length, length)
    if mask_B1SS is not None:
        scores_BHSS = scores_BHSS + mask_B1SS
    probabilities = scores_BHSS.softmax(dim=-1).view(-1, rows[1], length)
    return torch.bmm(probabilities, value_BGSD.flatten(0, 1)).view(query_BHSD.shape)


class TorchAttention(mcore.MegatronModule):
    """Core attention in plain torch; runs wherever torch does."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_unused):
        super().__init__(config)
        self._rotates = rotates(config, layer_number)

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None,
                packed_seq_params: AttentionContext = None):
        """query [S, B, H, D], key and value [S, B, G, D] with G dividing H  ->  [S, B, H * D]."""
        context = packed_seq_params
        if self._rotates:
            query, key = rotate(query, context), rotate(key, context)
        query_BHSD, key_BGSD = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3)
        value_BGSD = value.permute(1, 2, 0, 3)
        if context.explicit:
            out_BHSD = _explicit_attention(query_BHSD, key_BGSD, value_BGSD, context.mask_B1SS)
        else:
            out_BHSD = F.scaled_dot_product_attention(
                query_BHSD, key_BGSD, value_BGSD, attn_mask=context.mask_B1SS,
                is_causal=context.kind == "causal" and context.mask_B1SS is None,
                enable_gqa=query.shape[2] != key.shape[2])
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)


class PackedTorchAttention(mcore.MegatronModule):
    """Core attention in plain torch over segments laid end to end: no mask, no work between segments."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_unused):
        super().__init__(config)
        self._rotates = rotates(config, layer_number)

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None,
                packed_seq_params: AttentionContext = None):
        """query [T, H, D], key and value [T, G, D] with G dividing H  ->  [T, H * D]."""
        context = packed_seq_params
        if self._rotates:
            query, key = rotate(query, context), rotate(key, context)
        attend = _flash_over_segments() if query.is_cuda else _one_segment_after_another
        return attend(query, key, value, context).flatten(1)


def _one_segment_after_another(query_THD, key_TGD, value_TGD, context: AttentionContext):
    """[T, H, D], for a CPU, where reading the cuts costs nothing."""
    cuts = context.cu_seqlens_q.tolist()
    outputs = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        query_1HSD, key_1GSD, value_1GSD = (x[start:end].transpose(0, 1)[None] for x in (query_THD, key_TGD, value_TGD))
        out_1HSD = F.scaled_dot_product_attention(
            query_1HSD, key_1GSD, value_1GSD, is_causal=context.kind == "causal",
            enable_gqa=query_1HSD.shape[1] != key_1GSD.shape[1])
        outputs.append(out_1HSD[0].transpose(0, 1))
    return torch.cat(outputs)


def varlen_call(attention: Callable) -> Callable:
    """`attention`, torch's varlen_attn of whatever version, as a function of (query, key, value, context).

    Its way to say causal and its grouped queries differ between versions: 2.10 has `is_causal` and wants as many key
    heads as query heads; later ones have `window_size` and `enable_gqa`.
    """
    known = inspect.signature(attention).parameters

    def call(query_THD, key_TGD, value_TGD, context: AttentionContext):
        options = {}
        if context.kind == "causal":
            options = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        share = query_THD.shape[1] // key_TGD.shape[1]
        if share > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif share > 1:
            key_TGD, value_TGD = (x.repeat_interleave(share, dim=1) for x in (key_TGD, value_TGD))
        return attention(query_THD, key_TGD, value_TGD, context.cu_seqlens_q, context.cu_seqlens_kv,
                         context.max_seqlen_q, context.max_seqlen_kv, **options)

    return call


@functools.cache
def _flash_over_segments() -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_call(varlen_attn)


def packed_mask_type(kind: AttentionKind) -> mcore.AttnMaskType:
    """Transformer Engine's name for `kind` over packed segments: its THD kernels know no other two."""
    return mcore.AttnMaskType.padding_causal if kind == "causal" else mcore.AttnMaskType.padding


def transformer_engine_attention() -> type:
    """The core-attention class for the Transformer Engine spec; imports TE."""
    te = mcore.transformer_engine_modules()

    class PackedAttention(te.TEDotProductAttention):
        """TE's packed attention; its mask type comes from the micro-batch, not from the module."""

        def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None,
                    packed_seq_params: AttentionContext = None):
            """query [T, H, D], key and value [T, G, D]  ->  [T, H * D]."""
            context = packed_seq_params
            if rotates(self.config, self.layer_number):
                query, key = rotate(query, context), rotate(key, context)
            return super().forward(query, key, value, attention_mask, attn_mask_type=packed_mask_type(context.kind),
                                   attention_bias=attention_bias, packed_seq_params=context)

    return PackedAttention
