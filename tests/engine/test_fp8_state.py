"""FP8's scales in a checkpoint: under which names, read back by us and by megatron.core.

There and back on other topologies is in test_checkpoint.py. Not proved without Transformer Engine, and left to the test
marked `te`: that its delayed recipe keeps this state in `fp8_meta` of its layers (`give_fp8_state` puts it there), that
`make_fp8_state` makes it before the first step, and that its kernels go on from what was loaded.
"""

import pytest
import torch
from trunk_states import fill, give_fp8_state, make, state_at

from megatron_encdec.engine.boxes import fp8_state, make_fp8_state
from megatron_encdec.engine.loading import load, load_weights
from megatron_encdec.engine.saver import Saver
from megatron_encdec.engine.storage import stored_dtypes
from megatron_encdec.platform import megatron as mcore


def save(tmp_path, trunk, optimizer):
    saver = Saver(tmp_path / "checkpoints", trunk, optimizer, keep=1)
    saver.save(state_at(1))
    assert [event.error for event in saver.wait()] == [None]
    return tmp_path / "checkpoints" / "step_00000001"


def copies(trunk):
    return {name: value.clone() for name, value in fp8_state(trunk).items()}


@pytest.fixture(scope="module")
def written(topology, tmp_path_factory):
    """(checkpoint, its FP8 state by name)."""
    trunk, optimizer = make(topology)
    give_fp8_state(trunk)
    fill(trunk, optimizer)
    return save(tmp_path_factory.mktemp("fp8"), trunk, optimizer), copies(trunk)


def test_it_is_in_the_checkpoint_as_tensors_of_the_linear_layers_alone(written):
    path, state = written
    stored = mcore.dist_checkpointing.load_plain_tensors(str(path))  # megatron.core's own reader
    assert {name for name in stored if name.startswith("fp8.")} == state.keys() == {
        f"fp8.{layer}.{module}.{direction}.{part}" for layer in (0, 1)
        for module in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        for direction in ("scaling_fwd", "scaling_bwd") for part in ("scale", "amax_history")}
    assert all(torch.equal(stored[name], value) for name, value in state.items())
    assert not [name for name in stored_dtypes(path) if "_extra_state" in name]


def test_it_is_loaded_in_place(written, topology):
    path, state = written
    trunk, optimizer = make(topology, seed=2)
    give_fp8_state(trunk)
    live = fp8_state(trunk)
    assert not all(torch.equal(live[name], value) for name, value in state.items())
    load(path, trunk, optimizer)
    assert live.keys() == state.keys() and all(torch.equal(live[name], value) for name, value in state.items())


def test_a_checkpoint_without_any_leaves_the_scales_as_they_are(topology, tmp_path):
    trunk, optimizer = make(topology)
    fill(trunk, optimizer)
    path = save(tmp_path, trunk, optimizer)
    give_fp8_state(trunk)
    before = copies(trunk)
    load(path, trunk, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in fp8_state(trunk).items())


def test_a_run_without_fp8_loads_a_checkpoint_with_it(written, topology):
    plain, its_optimizer = make(topology, seed=2)
    load(written[0], plain, its_optimizer)
    load_weights(written[0], plain)
    make_fp8_state(plain)  # without a recipe nothing is made
    assert fp8_state(plain) == {}


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
    begun = copies(trunk)
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
