"""Attention: its kind and its boundaries travel with the micro-batch, never as state on a module.

    1. `AttentionContext`   what one micro-batch carries through every layer: kind, segments, rotary angles, masks
    2. `rotate`             rotary position embedding of queries and keys
    3. `TorchAttention`     of the torch layers: on windows, or on packed segments (THD)
    4. `transformer_engine_attention()`   the same on Transformer Engine's packed kernels

Shape suffixes: S window length, B windows, H heads, G of keys and values, D head dimension, T = B * S packed tokens.
Rotary positions count from the window's start. Attention between tokens of one segment depends only on their
distance, so a segment's outputs are those it would have alone.
"""

import functools
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F

from megatron_encdec.model.blocks import Blocks, Reach, blocks_within, reach, segment_mask
from megatron_encdec.objectives.base import AttentionKind
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device_type, varlen_is_usable


@dataclass
class AttentionContext(mcore.PackedSeqParams):
    """One micro-batch's attention; megatron.core hands it down as `packed_seq_params`.

    cos, sin: [S, 1, 1, D/2], packed [T, 1, D/2], in the compute dtype. kernels: `model/kernels.py`,
    where it turns packed queries and keys. sliding_window: of the layers that this is the context of.
    others: `layer_number` (from 1, of the whole trunk) -> the context of a layer that sees something else.

    Of windows that are not packed: blocks, and their additive mask_B1SS [N * B, 1, C, K] (or [1, 1, S, S]); None where
    the kind alone says who sees whom. explicit: scores are computed as a matrix, whose mask holds the kind too.
    """

    kind: AttentionKind = None
    cos: torch.Tensor = None
    sin: torch.Tensor = None
    sliding_window: int | None = None
    blocks: Blocks = None
    mask_B1SS: torch.Tensor | None = None
    explicit: bool = False
    kernels: ModuleType | None = None
    others: Mapping[int, "AttentionContext"] = field(default_factory=dict)

    @property
    def window_size(self) -> Reach:
        """How far a token sees, under the name that Transformer Engine has for it."""
        return reach(self.kind, self.sliding_window)

    def of(self, layer: torch.nn.Module) -> "AttentionContext":
        """What the attention module `layer` sees."""
        return self.others.get(layer.layer_number, self)


def explicit_is_faster(length: int, dtype: torch.dtype) -> bool:
    """Whether two batched products beat torch's fused kernel: on a CPU in bf16, 2 to 4 times at S = 256 and 512
    (docs/performance.md); the score matrix, S * S a head, bounds the length."""
    return device_type() == "cpu" and dtype == torch.bfloat16 and length <= 1024


def context_of_windows(kind: AttentionKind, sliding_window: int | None, cu_seqlens: torch.Tensor, windows: int,
                       length: int, isolated: bool, dtype: torch.dtype, explicit: bool | None = None,
                       **angles) -> AttentionContext:
    """Of `windows` x `length` tokens that are not packed. cu_seqlens: as in `segment_mask`; isolated: there are cuts
    inside the windows. explicit: None where speed may decide."""
    far = reach(kind, sliding_window)
    bounded = 0 <= far[0] < length - 1
    blocks = blocks_within(length, far if bounded else (-1, far[1]))
    if explicit is None:
        explicit = blocks.size == length and explicit_is_faster(length, dtype)
    mask_B1SS = None
    if isolated:
        mask_B1SS = segment_mask(cu_seqlens, windows, length, far, blocks, dtype)
    elif bounded or (explicit and kind == "causal"):  # the same of every window
        mask_B1SS = segment_mask(cu_seqlens.new_tensor([0, length]), 1, length, far, blocks, dtype)
        if len(mask_B1SS) > 1:
            mask_B1SS = mask_B1SS.repeat_interleave(windows, dim=0)
    return AttentionContext(qkv_format="sbhd", kind=kind, sliding_window=sliding_window, blocks=blocks,
                            mask_B1SS=mask_B1SS, explicit=explicit, **angles)


class _Rotate(torch.autograd.Function):
    """x turned by the angles; the gradient is turned back by them, so nothing but the angles is kept."""

    @staticmethod
    def forward(context, x, cos, sin, kernels):
        context.save_for_backward(cos, sin)
        context.turn = _turn if kernels is None or x.dim() != 3 else kernels.rotate
        return context.turn(x, cos, sin)

    @staticmethod
    def backward(context, gradient):
        return context.turn(gradient, *context.saved_tensors, back=True), None, None, None


def _turn(x, cos, sin, back: bool = False):
    """By the angles, or `back`. Written half by half into what comes out: without a copy to join them, seven passes of
    a GPU over x in place of nine."""
    turned = x.new_empty(x.shape)
    (first, second), (low, high) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=low)
    torch.mul(second, cos, out=high)
    other = torch.mul(second, sin)
    low.add_(other) if back else low.sub_(other)
    torch.mul(first, sin, out=other)
    high.sub_(other) if back else high.add_(other)
    return turned


def rotate(layer, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> tuple:
    """Queries and keys [S, B, H, D] (packed: [T, H, D]) with rotary embedding, halves forming the pairs.
    layer: the attention module; its config may leave its `layer_number` (from 1, of the whole trunk) without one."""
    pattern = layer.config.no_rope_freq
    if pattern and pattern[layer.layer_number - 1]:
        return query, key
    return tuple(_Rotate.apply(x, context.cos, context.sin, context.kernels) for x in (query, key))


class TorchAttention(mcore.MegatronModule):
    """Core attention in plain torch; runs wherever torch does."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, softcap=None,
                 **_unused):
        super().__init__(config)
        self.layer_number, self.scale, self.softcap = layer_number, softmax_scale, softcap

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None,
                packed_seq_params: AttentionContext = None):
        """query [S, B, H, D], key and value [S, B, G, D]  ->  [S, B, H * D]; packed, T in the place of S, B."""
        context = packed_seq_params.of(self)
        query, key = rotate(self, query, key, context)
        if context.qkv_format != "thd":
            attend = over_windows
        else:
            attend = _flash_over_segments if query.is_cuda else _one_segment_after_another
        return attend(query, key, value, context, self.scale, self.softcap).flatten(-2)


def over_windows(query, key, value, context: AttentionContext, scale: float | None = None,
                 softcap: float | None = None):
    """query [S, B, H, D], key and value [S, B, G, D]  ->  [S, B, H, D]. scale: of the scores, None: 1 / sqrt(D).
    softcap: bounds the scores, where the context is explicit."""
    blocks = context.blocks
    query_XHCD, key_XGKD, value_XGKD = blocks.queries(query), blocks.keys(key), blocks.keys(value)  # X: N * B
    if context.explicit:
        out_XHCD = _explicit_attention(query_XHCD, key_XGKD, value_XGKD, context.mask_B1SS, scale, softcap)
    else:
        out_XHCD = F.scaled_dot_product_attention(
            query_XHCD, key_XGKD, value_XGKD, attn_mask=context.mask_B1SS, enable_gqa=query.shape[2] != key.shape[2],
            is_causal=context.kind == "causal" and context.mask_B1SS is None, scale=scale)
    return blocks.together(out_XHCD, query.shape[1], query.shape[0])


def _explicit_attention(query_XHCD, key_XGKD, value_XGKD, mask_X1CK, scale: float | None, softcap: float | None):
    """softmax(q k^T / sqrt(D) + mask) v, the H / G queries of a group in one product."""
    blocks, heads, queries, width = query_XHCD.shape
    rows, keys = (-1, heads // key_XGKD.shape[1] * queries, width), key_XGKD.shape[2]
    scaled_XHCD = query_XHCD * (width**-0.5 if scale is None else scale)
    scores = torch.bmm(scaled_XHCD.reshape(rows), key_XGKD.flatten(0, 1).transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores_XHCK = scores.view(blocks, heads, queries, keys)
    if mask_X1CK is not None:
        scores_XHCK = scores_XHCK + mask_X1CK
    probabilities = scores_XHCK.softmax(dim=-1).view(-1, rows[1], keys)
    return torch.bmm(probabilities, value_XGKD.flatten(0, 1)).view(query_XHCD.shape)


def _one_segment_after_another(query_THD, key_TGD, value_TGD, context: AttentionContext, *settings):
    """For a CPU, where reading the cuts costs nothing."""
    outputs = []
    for start, end in itertools.pairwise(context.cu_seqlens_q.tolist()):
        alone = context_of_windows(context.kind, context.sliding_window, context.cu_seqlens_q, 1, end - start, False,
                                   query_THD.dtype, explicit=context.explicit)
        pieces = (x_THD[start:end, None] for x_THD in (query_THD, key_TGD, value_TGD))
        outputs.append(over_windows(*pieces, alone, *settings)[:, 0])
    return torch.cat(outputs)


def _flash_over_segments(query_THD, key_TGD, value_TGD, context: AttentionContext, scale: float | None = None,
                         _softcap: None = None):
    from torch.nn.attention.varlen import varlen_attn

    if scale is not None:  # of the kernel's own
        query_THD = query_THD * (scale * query_THD.shape[-1] ** 0.5)
    # torch 2.11 takes fewer heads of keys as they are, later ones ask to be told
    told = {"enable_gqa": query_THD.shape[1] != key_TGD.shape[1]} if _varlen_is_told_of_groups() else {}
    return varlen_attn(query_THD, key_TGD, value_TGD, context.cu_seqlens_q, context.cu_seqlens_kv,
                       context.max_seqlen_q, context.max_seqlen_kv, window_size=context.window_size, **told)


@functools.cache
def _varlen_is_told_of_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


# Transformer Engine's names for packed segments: its THD kernels know no other two.
PACKED_MASK_TYPES = {"causal": mcore.AttnMaskType.padding_causal, "bidirectional": mcore.AttnMaskType.padding}


def transformer_engine_attention() -> type:
    """The core-attention class for the Transformer Engine spec; imports TE."""
    class PackedAttention(mcore.transformer_engine_modules().TEDotProductAttention):
        """TE's packed attention; its mask type comes from the micro-batch, not from the module. Not used where kernels
        have to be deterministic: on Hopper TE 2.20 leaves cuDNN's where segments x heads x length^2 reach 2^30, for one
        that keeps whole masks (53 GiB for 32 windows of 1 024 short documents)."""

        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.kept_packed_seq_params.add("window_size")  # of the context, goes on to TE with the segments

        def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None,
                    packed_seq_params: AttentionContext = None):
            """query [T, H, D], key and value [T, G, D]  ->  [T, H * D]."""
            context = packed_seq_params.of(self)
            query, key = rotate(self, query, key, context)
            if torch.are_deterministic_algorithms_enabled() and varlen_is_usable():
                return _flash_over_segments(query, key, value, context, self.config.softmax_scale).flatten(-2)
            return super().forward(query, key, value, attention_mask, attn_mask_type=PACKED_MASK_TYPES[context.kind],
                                   attention_bias=attention_bias, packed_seq_params=context)

    return PackedAttention
