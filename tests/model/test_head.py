"""The chunked loss against torch's plain one over whole logits: value and gradients, padded columns in neither."""

import pytest
import torch
import torch.distributed as dist
from head_cases import ROWS, TOLERANCE, WIDTH, bias_of, inputs, ours, plain
from trunk_states import run_ranks

from megatron_encdec.model.head import chunk_rows, linear_cross_entropy


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize(("vocabulary", "padded"), [(97, 128), (128, 128), (5, 128)])
@pytest.mark.parametrize("chunk", [None, 1, 7, 40, 64])
def test_value_and_gradients(topology, dtype, vocabulary, padded, chunk):
    given = inputs(vocabulary, padded, dtype)
    found, expected = ours(*given, vocabulary, chunk=chunk), plain(*given, vocabulary)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not found[2][vocabulary:].any()  # padded rows of the table learn nothing


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize(("vocabulary", "padded"), [(97, 128), (128, 128)])
@pytest.mark.parametrize("chunk", [None, 7, 64])
def test_a_bias(topology, dtype, vocabulary, padded, chunk):
    given = inputs(vocabulary, padded, dtype)
    bias_V = bias_of(given[1])
    found, expected = ours(*given, vocabulary, bias_V, chunk=chunk), plain(*given, vocabulary, bias_V)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not found[3][vocabulary:].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_weights_multiply_loss_and_gradients(topology, dtype, chunk):
    """As torch's own, weighted and summed; the losses [N] stay as they are."""
    hidden_NH, table_VH, labels_N = inputs(97, 128, dtype)
    weights_N = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) * 20
    ours_, plain_ = ([x.clone().requires_grad_() for x in (hidden_NH, table_VH)] for _ in range(2))
    total, losses_N = linear_cross_entropy(*ours_, labels_N, 97, dist.group.WORLD, chunk, weights_N=weights_N)
    logits_NV = (plain_[0] @ plain_[1].T)[:, :97]
    logits_NV = logits_NV if dtype == torch.float64 else logits_NV.float()
    expected_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    (expected_N * weights_N).sum().backward()
    total.backward()
    torch.testing.assert_close(losses_N, expected_N.detach(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(total.detach(), (expected_N.detach() * weights_N).sum(), rtol=1e-2, atol=1e-9)
    for one, other in zip(ours_, plain_, strict=True):
        scale = other.grad.abs().max()
        torch.testing.assert_close(one.grad / scale, other.grad / scale, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_bounded_logits(topology, dtype, chunk):
    """c * tanh(logit / c), as Gemma 2 has it, with a bias before."""
    hidden_NH, table_VH, labels_N = inputs(97, 128, dtype)
    bias_V = bias_of(table_VH)
    ours_, plain_ = ([x.clone().requires_grad_() for x in (hidden_NH, table_VH, bias_V)] for _ in range(2))
    total, losses_N = linear_cross_entropy(*ours_[:2], labels_N, 97, dist.group.WORLD, chunk, bias_V=ours_[2],
                                           softcap=0.7)
    logits_NV = (plain_[0] @ plain_[1].T + plain_[2])[:, :97]
    expected_N = torch.nn.functional.cross_entropy(torch.tanh(logits_NV / 0.7) * 0.7, labels_N, reduction="none")
    unbounded_N = torch.nn.functional.cross_entropy(logits_NV.detach(), labels_N, reduction="none")
    expected_N.sum().backward()
    total.backward()
    torch.testing.assert_close(losses_N, expected_N.detach(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert (unbounded_N - losses_N).abs().max() > 1e-2
    for one, other in zip(ours_, plain_, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_no_labels(topology, dtype):
    hidden_NH, table_VH, labels_N = inputs(97, 128, dtype, rows=0)
    losses_N, hidden, table = ours(hidden_NH, table_VH, labels_N, 97)
    assert losses_N.shape == (0,) and hidden.shape == (0, WIDTH) and not table.any()


def test_without_gradients_none_are_made(topology):
    hidden_NH, table_VH, labels_N = inputs(97, 128, torch.float32)
    with torch.no_grad():
        total, _ = linear_cross_entropy(hidden_NH, table_VH.requires_grad_(), labels_N, 97, dist.group.WORLD)
    assert total.grad_fn is None


def test_large_logits_do_not_overflow(topology):
    table_V1 = torch.tensor([[1e4], [-1e4], [0.0], [5e4]])  # the last one is padding
    total, _ = linear_cross_entropy(torch.ones(1, 1), table_V1, torch.tensor([1]), 3, dist.group.WORLD)
    assert total.item() == pytest.approx(2e4)


def test_a_chunk_keeps_to_its_budget():
    assert chunk_rows(128256, "cpu") == 256 and chunk_rows(128256, "cuda") == 2048
    assert chunk_rows(128256, "cuda", 2) == 4160  # kernels need no fp32 copy
    assert chunk_rows(10**9, "cpu") == 64  # never less than a product is worth


SPLIT = """
    import sys
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    sys.path.insert(0, sys.argv[1])
    import head_cases

    rank = dist.get_rank()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for vocabulary, rows, chunk in ((97, 40, 7), (97, 40, None), (30, 40, 16), (97, 0, None)):
            hidden_NH, table_VH, labels_N = head_cases.inputs(vocabulary, 128, dtype, rows)
            expected = head_cases.plain(hidden_NH, table_VH, labels_N, vocabulary)
            mine_VH = table_VH.chunk(2)[rank]
            losses, hidden, table = head_cases.ours(hidden_NH, mine_VH, labels_N, vocabulary, chunk=chunk)
            dist.all_reduce(hidden)  # a rank has its columns' part
            for one, other in zip((losses, hidden, table), (*expected[:2], expected[2].chunk(2)[rank]), strict=True):
                torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
            bias_V = head_cases.bias_of(table_VH)
            expected = head_cases.plain(hidden_NH, table_VH, labels_N, vocabulary, bias_V)
            losses, *_, bias = head_cases.ours(hidden_NH, mine_VH, labels_N, vocabulary, bias_V.chunk(2)[rank],
                                               chunk=chunk)
            for one, other in ((losses, expected[0]), (bias, expected[3].chunk(2)[rank])):
                torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    print("equal")
"""


def test_a_vocabulary_split_over_two_ranks():
    """fp64 and fp32, an odd vocabulary, one that leaves the second rank nothing but padding, no labels at all."""
    from pathlib import Path

    assert run_ranks(2, SPLIT, Path(__file__).parents[1]) == ["equal\n"] * 2
