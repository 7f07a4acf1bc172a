"""Attention over packed segments: which kernel is called how, held against each segment attended to alone."""

import inspect

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_encdec.model import attention
from megatron_encdec.model.attention import AttentionContext, packed_mask_type, varlen_call

CUTS = [0, 3, 4, 11, 20]


def context_of(kind):
    cuts = torch.tensor(CUTS, dtype=torch.int32)
    return AttentionContext(qkv_format="thd", cu_seqlens_q=cuts, cu_seqlens_kv=cuts, max_seqlen_q=9, max_seqlen_kv=9,
                            kind=kind)


def over_all_pairs(query_THD, key_THD, value_THD, cuts, causal):
    """One score matrix of everything with everything, what may not be seen left out."""
    segment_T = torch.bucketize(torch.arange(len(query_THD), dtype=torch.int32), cuts, right=True)
    allowed_TT = segment_T[:, None] == segment_T[None]
    allowed_TT = allowed_TT.tril() if causal else allowed_TT
    out_HTD = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (query_THD, key_THD, value_THD)),
                                           attn_mask=allowed_TT)
    return out_HTD.transpose(0, 1)


def as_in_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    assert query.shape == key.shape and max_q == max_k == 9
    return over_all_pairs(query, key, value, cu_seq_q, is_causal)


def as_in_torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                     window_size=(-1, -1), enable_gqa=False):
    share = query.shape[1] // key.shape[1]
    assert enable_gqa == (share > 1) and window_size in ((-1, -1), (-1, 0))
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    return over_all_pairs(query, key, value, cu_seq_q, window_size == (-1, 0))


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [as_in_torch_2_10, as_in_torch_2_13])
def test_every_version_of_torchs_kernel_is_asked_for_the_same(kernel, groups, kind):
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(20, heads, 8, generator=draw) for heads in (4, groups, groups))
    one_by_one = attention._one_segment_after_another(query, key, value, context_of(kind))
    torch.testing.assert_close(varlen_call(kernel)(query, key, value, context_of(kind)), one_by_one,
                               atol=1e-5, rtol=1e-5)


def test_this_torchs_kernel_can_be_asked():
    """Its signature has the words that are used; where it has others, a GPU would be the first to notice."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    known = list(inspect.signature(varlen.varlen_attn).parameters)
    assert known[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "is_causal" in known or "window_size" in known


def test_transformer_engines_words_for_packed_segments():
    assert packed_mask_type("causal").name == "padding_causal"
    assert packed_mask_type("bidirectional").name == "padding"
