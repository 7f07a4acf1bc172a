"""FP8's scales in a checkpoint: tensors under names of their own, none where a checkpoint or a run has none.

Transformer Engine is not here, so a layer's `fp8_meta` is filled in by hand with what its delayed recipe keeps in it:
two records of two tensors. That it really does is for the tests marked `te`.
"""

from types import SimpleNamespace

import pytest
import torch
from trunk_states import fill, make, state_at

from megatron_encdec.engine.checkpoint import load, load_weights
from megatron_encdec.engine.fp8_state import fp8_state, make_fp8_state
from megatron_encdec.engine.saver import Saver
from megatron_encdec.engine.storage import stored_dtypes


def give_fp8_state(trunk, value):
    """Scales and histories in every linear layer of the layers, counting up from `value`; attention has some too."""
    for layer in trunk.decoder.layers:
        for module in (layer.self_attention.linear_qkv, layer.mlp.linear_fc2):
            module.fp8_meta = {"num_gemms": 1, "scaling_fwd": record(3, value), "scaling_bwd": record(2, value + 100)}
            value += 1
        layer.self_attention.core_attention.fp8_meta = {"scaling_fwd": record(9, 0), "scaling_bwd": record(6, 0)}


def record(tensors, value):
    return SimpleNamespace(scale=torch.full((tensors,), float(value)),
                           amax_history=torch.arange(4.0 * tensors).view(4, tensors) + value)


def save(tmp_path, trunk, optimizer):
    saver = Saver(tmp_path / "checkpoints", trunk, optimizer, keep=1)
    saver.save(state_at(1))
    assert [event.error for event in saver.wait()] == [None]
    return tmp_path / "checkpoints" / "step_00000001"


def test_there_and_back(topology, tmp_path):
    trunk, optimizer = make(topology)
    fill(trunk, optimizer)
    give_fp8_state(trunk, 1)
    path = save(tmp_path, trunk, optimizer)
    names = {name for name in stored_dtypes(path) if name.startswith("fp8.")}
    assert "fp8.1.mlp.linear_fc2.scaling_bwd.amax_history" in names and len(names) == 2 * 2 * 4

    other, its_optimizer = make(topology, seed=2)
    give_fp8_state(other, 50)
    load(path, other, its_optimizer)
    for name, value in fp8_state(trunk).items():
        assert torch.equal(fp8_state(other)[name], value), name


def test_a_checkpoint_without_any_leaves_the_scales_as_they_are(topology, tmp_path):
    trunk, optimizer = make(topology)
    fill(trunk, optimizer)
    path = save(tmp_path, trunk, optimizer)
    give_fp8_state(trunk, 7)
    before = {name: value.clone() for name, value in fp8_state(trunk).items()}
    load(path, trunk, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in fp8_state(trunk).items())


def test_a_run_without_fp8_loads_a_checkpoint_with_it(topology, tmp_path):
    trunk, optimizer = make(topology)
    fill(trunk, optimizer)
    give_fp8_state(trunk, 3)
    path = save(tmp_path, trunk, optimizer)
    plain, its_optimizer = make(topology, seed=2)
    load(path, plain, its_optimizer)
    load_weights(path, plain)
    assert fp8_state(plain) == {}


def test_nothing_is_made_without_a_recipe_that_has_state(topology):
    trunk, _ = make(topology)
    make_fp8_state(trunk)
    assert fp8_state(trunk) == {}


@pytest.mark.gpu
@pytest.mark.te
def test_the_delayed_recipes_own_state(topology, tmp_path):
    """Real layers of Transformer Engine: state from the start, changed by a step, the same after a load."""
    from megatron_encdec.engine.config import OptimizerSettings
    from megatron_encdec.engine.optimizer import build_optimizer, wrap
    from megatron_encdec.model.config import ModelConfig
    from megatron_encdec.model.precision import PrecisionSettings
    from megatron_encdec.model.trunk import build_trunk

    sizes = dict(num_layers=2, hidden_size=128, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=2,
                 vocabulary_size=301)

    def built(seed):
        trunk = build_trunk(ModelConfig(**sizes), topology, torch.bfloat16, 64, seed,
                            precision=PrecisionSettings("bf16", "delayed"))
        optimizer = build_optimizer(wrap(trunk), OptimizerSettings())
        make_fp8_state(trunk)
        return trunk, optimizer

    trunk, optimizer = built(1)
    begun = {name: value.clone() for name, value in fp8_state(trunk).items()}
    assert len(begun) == 2 * 4 * 4
    cuts = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    tokens_BS = torch.randint(2, 300, (1, 64), device="cuda")
    context = trunk.attention_context("bidirectional", cuts, 64, False, 1, 64)
    trunk(tokens_BS, context, torch.arange(64, device="cuda"), tokens_BS[0], summed=True).backward()
    context = trunk.attention_context("bidirectional", cuts, 64, False, 1, 64)
    trunk(tokens_BS, context, torch.arange(64, device="cuda"), tokens_BS[0], summed=True)
    assert fp8_state(trunk).keys() == begun.keys()  # attention has state after a forward pass, which is none of ours
    assert any(not torch.equal(value, begun[name]) for name, value in fp8_state(trunk).items())
    path = save(tmp_path, trunk, optimizer)
    other, its_optimizer = built(2)
    load(path, other, its_optimizer)
    for name, value in fp8_state(trunk).items():
        assert torch.equal(fp8_state(other)[name], value), name
