"""Attention over packed segments: which kernel is called how, held against each segment attended to alone."""

import inspect
import typing

import pytest
import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from megatron_encdec.model import attention
from megatron_encdec.model.attention import PACKED_MASK_TYPES, AttentionContext
from megatron_encdec.objectives.base import AttentionKind

CUTS = [0, 3, 4, 11, 20]


def context_of(kind, sliding_window=None):
    cuts = torch.tensor(CUTS, dtype=torch.int32)
    return AttentionContext(qkv_format="thd", cu_seqlens_q=cuts, cu_seqlens_kv=cuts, max_seqlen_q=9, max_seqlen_kv=9,
                            kind=kind, sliding_window=sliding_window)


def over_all_pairs(query_THD, key_THD, value_THD, cuts, window_size):
    """One score matrix of everything with everything, what may not be seen left out."""
    before, after = (len(query_THD) if side < 0 else side for side in window_size)
    segment_T = torch.bucketize(torch.arange(len(query_THD), dtype=torch.int32), cuts, right=True)
    allowed_TT = segment_T[:, None] == segment_T[None]
    allowed_TT = allowed_TT.tril(after).triu(-before)
    out_HTD = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (query_THD, key_THD, value_THD)),
                                           attn_mask=allowed_TT)
    return out_HTD.transpose(0, 1)


def on_a_cpu(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """torch's kernel, which needs a GPU, as plain products."""
    share = query.shape[1] // key.shape[1]
    assert enable_gqa == (share > 1) and max_q == max_k == 9
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    return over_all_pairs(query, key, value, cu_seq_q, window_size)


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 8])
def test_torchs_kernel_is_asked_for_each_segment_alone(monkeypatch, groups, kind, sliding_window):
    monkeypatch.setattr(varlen, "varlen_attn", on_a_cpu)
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(20, heads, 8, generator=draw) for heads in (4, groups, groups))
    one_by_one = attention._one_segment_after_another(query, key, value, context_of(kind, sliding_window))
    asked = attention._flash_over_segments(query, key, value, context_of(kind, sliding_window))
    torch.testing.assert_close(asked, one_by_one, atol=1e-5, rtol=1e-5)


def test_this_torchs_kernel_can_be_asked():
    """Its signature has the words that are used; where it has others, a GPU would be the first to notice."""
    known, used = (inspect.signature(kernel).parameters for kernel in (varlen.varlen_attn, on_a_cpu))
    assert list(known)[:7] == list(used)[:7] and used.keys() <= known.keys()
    assert all(known[name].default == used[name].default for name in used)


def test_transformer_engines_words_for_packed_segments():
    assert {kind: PACKED_MASK_TYPES[kind].name for kind in typing.get_args(AttentionKind)} == {
        "causal": "padding_causal", "bidirectional": "padding"}
