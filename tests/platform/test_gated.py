"""Gated units as one function: the bits of the steps that they stand for, and the gradients of torch's own."""

import pytest
import torch
import torch.nn.functional as F

from megatron_encdec.platform import gated

UNITS = {"swiglu": (gated.swiglu, F.silu), "geglu": (gated.geglu, F.gelu)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("unit", UNITS)
def test_value_and_gradient(unit, dtype):
    together, activation = UNITS[unit]
    draw = torch.Generator().manual_seed(0)
    rows, twin = ((4 * torch.randn(5, 3, 2 * 70, generator=draw.manual_seed(1))).to(dtype).requires_grad_()
                  for _ in range(2))
    gate, up = twin.chunk(2, dim=-1)
    found, expected = together(rows), activation(gate) * up
    assert torch.equal(found, expected)
    pull = torch.randn(expected.shape, generator=draw).to(dtype)
    found.backward(pull)
    expected.backward(pull)
    assert torch.equal(rows.grad, twin.grad)


def test_gelu_is_the_exact_one():
    """Not its approximation by tanh, which megatron.core computes in one function."""
    rows = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    assert gated.geglu(rows).item() == pytest.approx(0.5 * (1 + torch.erf(torch.tensor(0.5, dtype=torch.float64).sqrt())
                                                            .item()), abs=1e-12)
    from megatron_encdec.platform import megatron as mcore

    assert torch.equal(mcore._mlp.bias_geglu_impl(rows, None), gated.geglu(rows))
