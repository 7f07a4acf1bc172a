"""The vocabulary-parallel loss against torch's, padded columns included in neither."""

import pytest
import torch
import torch.distributed as dist

from megatron_encdec.model.head import vocabulary_parallel_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "padded"), [(97, 128), (128, 128), (5, 128)])
def test_value_and_gradient(topology, dtype, vocabulary, padded):
    draw = torch.Generator().manual_seed(0)
    logits_NV = (4 * torch.randn(40, padded, generator=draw)).to(dtype)
    labels_N = torch.randint(0, vocabulary, (40,), generator=draw)
    weights_N = torch.rand(40, generator=draw)

    plain_NV = logits_NV.clone().requires_grad_()
    expected_N = torch.nn.functional.cross_entropy(plain_NV[:, :vocabulary].float(), labels_N, reduction="none")
    (expected_N * weights_N).sum().backward()

    ours_NV = logits_NV.clone().requires_grad_()
    loss_N = vocabulary_parallel_cross_entropy(ours_NV * 1, labels_N, vocabulary, dist.group.WORLD)
    (loss_N * weights_N).sum().backward()

    torch.testing.assert_close(loss_N, expected_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_NV.grad, plain_NV.grad)
    assert not ours_NV.grad[:, vocabulary:].any()


def test_large_logits_do_not_overflow(topology):
    logits_NV = torch.tensor([[1e4, -1e4, 0.0, 5e4]])  # the last column is padding
    loss_N = vocabulary_parallel_cross_entropy(logits_NV, torch.tensor([1]), 3, dist.group.WORLD)
    assert loss_N.item() == pytest.approx(2e4)
