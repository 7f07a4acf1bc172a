"""What an update does: StableAdamW against its formula and on any topology, kinds of parameters without decay."""

import json

import pytest
import torch
from trunk_states import give_gradients, make, run_ranks, updated

from megatron_encdec.engine import checkpoint, loading
from megatron_encdec.engine.boxes import wanted
from megatron_encdec.engine.config import OptimizerSettings
from megatron_encdec.engine.optimizer import (
    build_optimizer,
    freeze,
    gradient_norm,
    local_states,
    set_learning_rate,
    update,
    update_count,
    wrap,
)
from megatron_encdec.model.parts import Frozen, places

KEYS = dict(name="stable_adamw", eps=1e-8, no_decay=("norms", "embeddings"))
STABLE = OptimizerSettings(**KEYS)
LAYOUTS = {"tp2": (2, 1, False), "pp2": (1, 2, True), "dp2": (1, 1, False)}  # tensor, pipeline, tied embeddings
ON_RANKS = """
    import json, sys
    from pathlib import Path
    from trunk_states import state_at, updated
    from megatron_encdec.engine.config import OptimizerSettings
    from megatron_encdec.engine.saver import Saver
    from megatron_encdec.platform import distributed, megatron
    settings = OptimizerSettings(**json.loads(sys.argv[3]))
    for layout, (tensor, pipeline, tied) in json.loads(sys.argv[2]).items():
        trunk, optimizer = updated(distributed.initialize(tensor, pipeline), 8, settings, tied_embeddings=tied)
        saver = Saver(Path(sys.argv[1]) / layout, trunk, optimizer, keep=1)
        saver.save(state_at(1))
        print(saver.wait()[0].error)
        megatron.parallel_state.destroy_model_parallel()
    distributed.shutdown()
"""


def test_stable_adamw_is_algorithm_2(topology):
    """Of arXiv 2304.13013, written out plainly."""
    trunk, optimizer = make(topology, settings=STABLE)
    weights = {place: place.parameter.detach().clone() for place in places(trunk)}
    first = {place: torch.zeros_like(weight) for place, weight in weights.items()}
    second = {place: torch.zeros_like(weight) for place, weight in weights.items()}
    divided = 0
    for step in range(1, 21):
        give_gradients(trunk, step)
        gradients = {place: place.parameter.main_grad.clone() for place in weights}
        norm = gradient_norm(optimizer)
        set_learning_rate(optimizer, lr := 0.01 / step)
        update(optimizer, norm)
        for place, weight in weights.items():
            gradient = gradients[place] * min(1.0, STABLE.clip_grad / (norm + 1e-6))
            ours = [beta * (1 - beta ** (step - 1)) / (1 - beta ** step) for beta in STABLE.betas]
            first[place] = ours[0] * first[place] + (1 - ours[0]) * gradient
            second[place] = ours[1] * second[place] + (1 - ours[1]) * gradient ** 2
            rms = float((gradient ** 2 / second[place].clamp(min=STABLE.eps ** 2)).mean().sqrt())
            rate, divided = lr / max(1.0, rms), divided + (rms > 1.5)
            decay = 0.0 if place.kind in STABLE.no_decay else STABLE.weight_decay
            weight.mul_(1 - rate * decay).sub_(rate * first[place] / (second[place].sqrt() + STABLE.eps))
            torch.testing.assert_close(place.parameter.detach(), weight, rtol=1e-4, atol=1e-6)
    assert divided > 20 and update_count(optimizer) == 20
    state = local_states(optimizer)[next(iter(weights)).parameter]
    assert sorted(state.tensors) == ["exp_avg", "exp_avg_sq", "param"]


def test_stable_adamw_on_any_topology(topology, tmp_path):
    """The mean is over the whole parameter, copies counted once."""
    assert run_ranks(2, ON_RANKS, tmp_path, json.dumps(LAYOUTS), json.dumps(KEYS)) == ["None\n" * len(LAYOUTS)] * 2
    for layout, (_, _, tied) in LAYOUTS.items():
        expected = wanted(*updated(topology, 8, STABLE, tied_embeddings=tied))
        trunk, optimizer = make(topology, seed=9, settings=STABLE, tied_embeddings=tied)
        loading.load(checkpoint.newest(tmp_path / layout), trunk, optimizer)
        assert update_count(optimizer) == 8
        for found, box in zip(wanted(trunk, optimizer), expected, strict=True):
            torch.testing.assert_close(found.values, box.values, rtol=1e-5, atol=1e-7, msg=f"{layout}: {box.key}")


@pytest.mark.parametrize("kinds", [(), ("norms",), ("embeddings", "biases"), ("norms", "biases", "embeddings")])
@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
def test_no_decay_leaves_those_kinds_alone(name, kinds, topology):
    """Without a gradient nothing but the decay moves a weight."""
    settings = OptimizerSettings(name=name, no_decay=kinds)
    trunk, optimizer = make(topology, settings=settings, qkv_bias=True)
    with torch.no_grad():
        for state in local_states(optimizer).values():
            state.tensors["param"].fill_(1.0)
    set_learning_rate(optimizer, 0.5)
    update(optimizer, gradient_norm(optimizer))
    found = {place.kind: float(place.parameter.detach().mean()) for place in places(trunk)}
    assert found == {kind: pytest.approx(1.0 if kind in kinds else 0.95)
                     for kind in ("embeddings", "head", "matrices", "norms", "biases")}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
def test_frozen_parameters_have_no_part_in_an_update(name, overlap, topology):
    trunk, _ = make(topology)
    ddp = wrap(trunk, overlap)
    optimizer = build_optimizer(ddp, OptimizerSettings(name=name))
    for step, words in enumerate((["embeddings", "layers 1"], ["embeddings", "layers 1"], ["head"], [])):
        freeze(ddp, optimizer, frozen := Frozen.parse(words))
        before = {box.key: box.values.clone() for box in wanted(trunk, optimizer)}
        give_gradients(trunk, step)
        set_learning_rate(optimizer, 0.01)
        expected = sum(float(place.parameter.main_grad.double().square().sum()) for place in places(trunk)
                       if not frozen.holds(place, 2)) ** 0.5
        assert (norm := gradient_norm(optimizer)) == pytest.approx(expected)
        update(optimizer, norm)
        held = {place.name: frozen.holds(place, 2) for place in places(trunk)}
        assert all(place.parameter.requires_grad != (held[place.name] and not overlap) for place in places(trunk))
        assert {int(state["step"]) for state in optimizer.chained_optimizers[0].optimizer.state.values()} == {step + 1}
        after = {box.key: box.values for box in wanted(trunk, optimizer)}
        for key, values in before.items():
            if key.endswith(("word_embeddings.weight", "output_layer.weight")):
                assert torch.equal(values, after[key]) == held[key.removeprefix("optimizer.state.").split(".", 1)[-1]
                                                               if key.startswith("optimizer") else key], key
