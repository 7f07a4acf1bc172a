"""Sliding windows: what a token sees at the edge, on every attention path of a CPU, and what that costs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from megatron_encdec.model.attention import context_of_windows, over_windows
from megatron_encdec.model.blocks import Blocks, blocks_within, reach
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.performance import PerformanceSettings
from megatron_encdec.model.trunk import build_trunk

LENGTH, VOCABULARY = 300, 101
MASKED, PACKED = (PerformanceSettings(attention=one) for one in ("masked", "packed"))


def trunk_of(topology, dtype=torch.float32, performance=MASKED, **changes):
    sizes = dict(num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 vocabulary_size=VOCABULARY, init_std=0.2)
    return build_trunk(ModelConfig(**{**sizes, **changes}), topology, dtype, LENGTH, seed=5, performance=performance)


def cuts_of(windows, length, ends=()):
    ends = sorted({*ends, length})
    return torch.tensor([0] + [b * length + end for b in range(windows) for end in ends], dtype=torch.int32)


def hidden_states(trunk, tokens_BS, kind, ends=()):
    """[B, S, H]"""
    windows, length = tokens_BS.shape
    context = trunk.attention_context(kind, cuts_of(windows, length, ends), length, bool(ends), windows, length)
    with torch.no_grad():
        hidden = trunk.hidden_states(tokens_BS, context)
    return hidden.view(windows, length, -1) if trunk.packed else hidden.transpose(0, 1)


def moved(trunk, kind, position, windows=2, length=LENGTH, ends=()):
    """Positions of window 0 that move when its token at `position` changes; other windows must not."""
    tokens_BS = torch.randint(2, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(0))
    changed_BS = tokens_BS.clone()
    changed_BS[0, position] = (tokens_BS[0, position] - 1) % (VOCABULARY - 2) + 2
    difference_BS = (hidden_states(trunk, tokens_BS, kind, ends)
                     - hidden_states(trunk, changed_BS, kind, ends)).abs().amax(dim=-1)
    assert (difference_BS[1:] == 0).all()
    return torch.nonzero(difference_BS[0]).flatten().tolist()


def dense(query_SBHD, key_SBGD, value_SBGD, kind, window, ends):
    """Attention with the whole score matrix, who sees whom written out."""
    length = len(query_SBHD)
    apart_SS = torch.arange(length)[:, None] - torch.arange(length)  # i - j, for the query i
    segment_S = torch.bucketize(torch.arange(length), torch.tensor(sorted({*ends, length})), right=True)
    near = (apart_SS >= 0) & (apart_SS < window) if kind == "causal" else apart_SS.abs() <= window
    out = scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (query_SBHD, key_SBGD, value_SBGD)),
                                       attn_mask=near & (segment_S[:, None] == segment_S), enable_gqa=True)
    return out.permute(2, 0, 1, 3)


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
@pytest.mark.parametrize("ends", [(), (1, 63, 64, 180)], ids=["whole", "isolated"])
@pytest.mark.parametrize(("length", "window", "blocks"), [
    (300, 1, True), (300, 20, True), (256, 64, True), (1000, 150, True), (500, 500, False), (300, 299, False),
    (300, 700, False), (65, 2, False)])
def test_blocks_compute_what_one_matrix_computes(kind, ends, length, window, blocks):
    """Outputs and gradients; lengths that are no multiple of a block, windows beyond the text."""
    draw = torch.Generator().manual_seed(window)
    shapes = [(length, 2, heads, 8) for heads in (4, 2, 2)]
    ours, theirs = ([torch.randn(shape, generator=draw.manual_seed(number)).requires_grad_()
                     for number, shape in enumerate(shapes)] for _ in range(2))
    ends = tuple(end for end in ends if end < length)
    context = context_of_windows(kind, window, cuts_of(2, length, ends), 2, length, bool(ends), torch.float32)
    assert (context.blocks != Blocks(length)) == blocks
    found, expected = over_windows(*ours, context), dense(*theirs, kind, window, ends)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    pull = torch.randn(found.shape, generator=draw)
    (found * pull).sum().backward()
    (expected * pull).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "performance"), [(torch.float32, MASKED), (torch.bfloat16, MASKED),
                                                    (torch.float32, PACKED), (torch.bfloat16, PACKED)],
                         ids=["masked", "masked-bf16", "packed", "packed-bf16"])
@pytest.mark.parametrize(("window", "length"), [(1, LENGTH), (7, LENGTH), (70, LENGTH), (7, 40)])
def test_the_edge_of_a_window(topology, dtype, performance, window, length):
    """In one layer the last token inside moves what sees it, the first outside moves nothing. Windows of 40 tokens are
    one block, which bf16 computes as a matrix."""
    trunk, position = trunk_of(topology, dtype, performance, sliding_window=window), length // 2
    inside = moved(trunk, "causal", position, length=length)
    assert inside == list(range(position, min(position + window, length)))
    inside = moved(trunk, "bidirectional", position, length=length)
    assert inside == list(range(max(position - window, 0), min(position + window + 1, length)))


@pytest.mark.parametrize("performance", [MASKED, PACKED], ids=["masked", "packed"])
def test_a_window_ends_where_its_document_does(topology, performance):
    trunk = trunk_of(topology, performance=performance, sliding_window=20)
    ends = (100, 130)
    assert moved(trunk, "bidirectional", 110, ends=ends) == list(range(100, 130))
    assert moved(trunk, "causal", 125, ends=ends) == list(range(125, 130))
    assert moved(trunk, "bidirectional", 99, ends=ends) == list(range(79, 100))


def test_layers_have_their_own_windows(topology):
    """A layer without a window sees everything; two with one see twice as far."""
    far = {(): 2 * 7, (0,): LENGTH, (1,): LENGTH}
    for without, distance in far.items():
        trunk = trunk_of(topology, num_layers=2, sliding_window=7, layers_without_window=list(without))
        reached = moved(trunk, "bidirectional", 150)
        assert reached == list(range(max(0, 150 - distance), min(LENGTH, 150 + distance + 1)))


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_paths_agree_on_a_trunk_of_both_kinds_of_layers(topology, kind):
    changes = dict(num_layers=3, sliding_window=9, layers_without_window=[1])
    tokens_BS = torch.randint(2, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    for ends in ((), (100, 130)):
        masked, packed = (hidden_states(trunk_of(topology, performance=one, **changes), tokens_BS, kind, ends)
                          for one in (MASKED, PACKED))
        torch.testing.assert_close(masked, packed, atol=5e-6, rtol=1e-5)


def test_a_micro_batch_has_one_mask_for_each_kind_of_layer(topology):
    trunk = trunk_of(topology, num_layers=6, sliding_window=9, layers_without_window=[0, 3])
    context = trunk.attention_context("causal", cuts_of(1, LENGTH, (100,)), LENGTH, True, 1, LENGTH)
    assert set(context.others) == {2, 3, 5, 6} and len(set(map(id, context.others.values()))) == 1
    assert context.mask_B1SS.shape == (1, 1, LENGTH, LENGTH) and context.others[2].mask_B1SS.shape == (5, 1, 64, 128)
    short = trunk.attention_context("causal", cuts_of(1, 9), 9, False, 1, 9)
    assert not short.others and short.mask_B1SS is None  # nothing is out of reach


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_cost_grows_with_the_window_and_not_with_length_squared(kind):
    def flops(length, window):
        x = torch.randn(length, 1, 2, 8, requires_grad=True)
        context = context_of_windows(kind, window, cuts_of(1, length), 1, length, False, torch.float32)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            over_windows(x, x, x, context).sum().backward()
        return counter.get_total_flops()

    assert flops(4096, 128) == 2 * flops(2048, 128) and flops(4096, 256) == 2 * flops(4096, 128)
    assert flops(4096, None) == 4 * flops(2048, None) > 12 * flops(4096, 128)
    assert blocks_within(4096, reach(kind, 4000)) == Blocks(4096)
