"""The CPU backend answers for CUDA and leaves everything else in torch as it was."""

from types import SimpleNamespace

import pytest
import torch

from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.cpu_backend import install_gathering
from megatron_encdec.platform.device import device_type

pytestmark = pytest.mark.skipif(device_type() == "cuda", reason="a GPU is here, the CPU backend is not used")


def test_device_contexts_still_work():
    with torch.device("meta"):
        assert torch.zeros(3).is_meta and torch.arange(4).is_meta
    assert torch.zeros(3).device.type == "cpu"


def test_cuda_literals_land_on_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).cuda().to("cuda:0").device.type == "cpu"
    assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    assert not torch.cuda.is_available()


def test_gradient_norm_keeps_its_digits(topology):
    """megatron.core's fallback is off by 1e-5 on a tensor of this size."""
    import megatron.core.optimizer.clip_grads as clip_grads

    assert mcore.__version__
    grads = [torch.randn(4_000_003, generator=torch.Generator().manual_seed(0)), torch.ones(5)]
    exact = torch.cat(grads).double().norm().item()
    norm = clip_grads.get_grad_norm_fp32(grads, grad_stats_parallel_group=torch.distributed.group.WORLD)
    assert norm == pytest.approx(exact, rel=2e-7)


def test_a_data_parallel_group_of_one_rank_copies_nothing_to_itself(topology):
    """Only in place: into another tensor it is a copy that somebody wants."""
    calls = []
    module = SimpleNamespace(**dict.fromkeys(("dist_all_gather_func", "dist_reduce_scatter_func"),
                                             lambda *_args, **_kwargs: calls.append("called")))
    install_gathering(module)
    values, group = torch.ones(4), torch.distributed.group.WORLD
    for collective in vars(module).values():
        collective(values, values.view(-1), group=group, async_op=False)
        assert not calls
        collective(torch.empty(4), values, group=group, async_op=False)
        assert calls.pop() == "called"
