"""Our Triton kernels against the same in torch: compiled on a GPU, line by line in Triton's interpreter without one.

    TRITON_INTERPRET=1 ENCDEC_ENV=nemo bash tests/run.sh tests/model/test_kernels.py

tests/model/test_on_gpu.py holds the trunk that uses them against fp32.
"""

import os

import pytest
import torch
import torch.distributed as dist
from head_cases import TOLERANCE, bias_of, inputs, ours, plain

from megatron_encdec.model import attention
from megatron_encdec.platform import gated
from megatron_encdec.platform.device import device

pytest.importorskip("triton", reason="needs Triton: ENCDEC_ENV=nemo has it")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from megatron_encdec.model import kernels  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(70, 3, 64), (1, 1, 6), (0, 2, 8)])
@pytest.mark.parametrize("back", [False, True])
def test_rotation_of_a_slice_of_the_projection(dtype, tokens, heads, width, back):
    draw = torch.Generator().manual_seed(0)
    x_THD = torch.randn(tokens, heads, 3 * width, generator=draw).to(device(), dtype)[..., width:2 * width]
    angles = torch.randn(tokens, 1, width // 2, generator=draw)
    cos, sin = (turn(angles).to(device(), dtype) for turn in (torch.cos, torch.sin))
    found = kernels.rotate(x_THD, cos, sin, back)
    assert found.is_contiguous() and found.dtype == dtype
    exact = attention._turn(*(x.double() for x in (x_THD, cos, sin)), back)
    torch.testing.assert_close(found.double(), exact, **(dict(atol=1e-6, rtol=1e-6) if dtype == torch.float32 else
                                                         dict(atol=1e-2, rtol=1e-2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(5, 2, 2 * 1030), (7, 6), (0, 8)])
def test_swiglu_and_its_gradient(dtype, shape):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(*shape, generator=draw).to(device(), dtype).requires_grad_()
    exact = rows.detach().double().requires_grad_()
    found, expected = kernels.swiglu(rows), gated.swiglu(exact)
    gradient = torch.randn(expected.shape, generator=draw).to(device(), dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    close = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(found.detach().double(), expected.detach(), **close)
    torch.testing.assert_close(rows.grad.double(), exact.grad, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocabulary", "padded"), [(97, 128), (8200, 8320)])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_the_heads_loss_and_gradients(topology, dtype, vocabulary, padded, chunk, bias):
    given = [x.to(device()) for x in inputs(vocabulary, padded, dtype)]
    bias_V = bias_of(given[1].cpu()).to(device()) if bias else None
    found, expected = (ours(*given, vocabulary, bias_V, chunk=chunk, kernels=kernels),
                       plain(*given, vocabulary, bias_V))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not found[2][vocabulary:].any()  # padded rows of the table learn nothing


def test_weights_of_losses(topology):
    from megatron_encdec.model.head import linear_cross_entropy

    hidden_NH, table_VH, labels_N = (x.to(device()) for x in inputs(97, 128, torch.float32))
    weights_N = torch.rand(len(labels_N), generator=torch.Generator().manual_seed(1)).to(device())
    gradients = []
    for one in (kernels, None):
        copies = [x.clone().requires_grad_() for x in (hidden_NH, table_VH)]
        linear_cross_entropy(*copies, labels_N, 97, dist.group.WORLD, 7, one, weights_N)[0].backward()
        gradients.append([copy.grad for copy in copies])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_rank_whose_columns_are_all_padding():
    """Maximum -inf and sum 0, which the group's take the place of; and then a gradient of zeros."""
    logits_CV = torch.randn(3, 40, device=device())
    labels_C, here_C = torch.zeros(3, dtype=torch.int64, device=device()), torch.zeros(3, dtype=bool, device=device())
    maximum_C, total_C, own_C = kernels.row_statistics(logits_CV, labels_C, here_C, 0)
    assert torch.isneginf(maximum_C).all() and not total_C.any() and not own_C.any()
    group = torch.full((3,), 2.0, device=device())
    assert not kernels.logits_gradient_(logits_CV, group, group, labels_C, here_C, 0, None).any()
