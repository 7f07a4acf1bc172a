"""Transformer Engine's own Python around our trunk, on a CPU: its layers, attention, FP8 recipes and optimizer run as
they are; the functions of its compiled binding are torch's (te_binding.py).

What this cannot show: that a kernel computes the right numbers or any at all, how fast one is, how much memory it
takes, what cuDNN or cuBLAS refuse, anything about NCCL, streams or CUDA graphs. Tests marked `te` and `gpu` do.

What it does show: names, shapes and pieces of checkpoints; which arguments reach attention; what state the FP8 recipes
keep and when weights are cast; that gradients arrive where the optimizer looks for them.

Transformer Engine has to be there before megatron.core, so these run alone:
    ENCDEC_ENV=te bash tests/run.sh -n 0 -m te_python tests/test_te_python.py
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import te_binding  # first: before megatron.core
import torch
from random_models import MODERNBERT
from te_binding import calls, on_a_gpu
from trunk_states import fill, give_gradients, state_at, wrong

from megatron_encdec.data.samples import Sample
from megatron_encdec.engine.boxes import fp8_state, make_fp8_state, pieces, wanted
from megatron_encdec.engine.config import OptimizerSettings
from megatron_encdec.engine.loading import load
from megatron_encdec.engine.optimizer import (
    build_optimizer,
    freeze,
    gradient_norm,
    local_states,
    reset_moments,
    set_learning_rate,
    set_update_count,
    update,
    update_count,
    wrap,
)
from megatron_encdec.engine.saver import Saver
from megatron_encdec.engine.storage import stored_dtypes
from megatron_encdec.model import trunk as trunks
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.parts import Frozen, places
from megatron_encdec.model.performance import PerformanceSettings
from megatron_encdec.model.precision import PrecisionSettings
from megatron_encdec.objectives.base import Objective, Vocabulary
from megatron_encdec.platform import distributed
from megatron_encdec.training.step import Trainer
from megatron_encdec.training.work import Work

pytestmark = pytest.mark.te_python
LENGTH, VOCABULARY, CUTS = 32, 301, [9, 25, 32]
TE, TORCH = "transformer_engine", "torch"
VARIANTS = {"plain": {}, "qk_norm": {"qk_norm": True}, "qkv_bias": {"qkv_bias": True},
            "tied": {"tied_embeddings": True}, "layers_without_rope": {"layers_without_rope": [1]},
            "sliding_window": {"sliding_window": 3, "layers_without_window": [0]}, "modernbert": MODERNBERT,
            "embedding_norm": {"embedding_norm": True},
            "gemma": {"norm_place": "both", "norm_zero_centered": True, "activation": "geglu_tanh", "qk_norm": True,
                      "embedding_multiplier": 8.0, "attention_multiplier": 0.3, "logits_softcap": 5.0},
            "olmo": {"norm_place": "after", "qk_norm": True, "qk_norm_over": "heads"},
            "granite": {"residual_multiplier": 0.4, "logits_scaling": 2.0, "qkv_bias": True,
                        "attention_output_bias": True}}
MIXTURE = {"name": "mixture", "parts": [{"objective": "clm"}, {"objective": "mlm:0.4"}]}


class Windows:
    """Random tokens of three documents each."""

    sequence_length, seed = LENGTH, 3

    def sample(self, index):
        tokens_S = np.random.default_rng(index).integers(2, VOCABULARY, LENGTH)
        return Sample(index, 0, 0, index, tokens_S, np.array(CUTS))


@pytest.fixture(autouse=True)
def te_on_a_cpu(monkeypatch):
    """A config cannot ask for it: on a CPU `choose_layers` refuses."""
    monkeypatch.setattr(trunks, "choose_layers", lambda wanted, *_others: wanted)
    calls.clear()


def trainer_of(topology, layers=TE, seed=5, precision=None, settings=None, sequence=False, performance=None, **model):
    """With biases that are not zero: they are drawn as norms are, all alike."""
    sizes = dict(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
                 vocabulary_size=VOCABULARY, init_std=0.1, layers=layers) | model
    performance = PerformanceSettings(**{"fuse_gradients": layers == TE} | (performance or {}))
    with on_a_gpu():
        trunk = trunks.build_trunk(ModelConfig(**sizes), topology, torch.bfloat16, LENGTH, seed, sequence, performance,
                                   precision)
    for name, parameter in trunk.named_parameters():
        if name.endswith(("qkv.bias", "proj.bias")):
            parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()))
    ddp = wrap(trunk)
    optimizer = build_optimizer(ddp, settings or OptimizerSettings(lr=1e-3))
    make_fp8_state(trunk)
    return Trainer(ddp, optimizer, topology, Vocabulary(VOCABULARY, frozenset({0}), 1))


def work(objective="mlm:0.4", step=0, windows=4, micro=2):
    numbers = range(step * windows, (step + 1) * windows)
    return Work(Windows(), Objective.from_yaml(objective, "objective"), numbers, micro)


def train(trainer, count, objective="mlm:0.4", again=False):
    """(loss, gradient norm) of so many steps; again: of the same windows."""
    with on_a_gpu():
        results = [trainer.train_step(work(objective, 0 if again else step), 1e-3) for step in range(count)]
    return [(result.loss, result.grad_norm) for result in results]


def evaluate(trainer):
    with on_a_gpu():
        return trainer.evaluate(work()).loss


def same(ours, theirs, loss=3e-3, norm=2e-2):
    """Of two lists from `train`, within what bf16 rounds."""
    for (loss_1, norm_1), (loss_2, norm_2) in zip(ours, theirs, strict=True):
        assert loss_1 == pytest.approx(loss_2, rel=loss) and norm_1 == pytest.approx(norm_2, rel=norm)


def asked(name):
    return [arguments for one, arguments in calls if one == name]


def saved(trainer, folder: Path) -> Path:
    saver = Saver(folder / "checkpoints", trainer.trunk, trainer.optimizer, keep=1)
    saver.save(state_at(1))
    assert [event.error for event in saver.wait()] == [None]
    return folder / "checkpoints" / "step_00000001"


def contents(trainer):
    return {(box.key, box.offset): box.values.clone() for box in wanted(trainer.trunk, trainer.optimizer)}


def test_it_is_transformer_engines_own_code_over_the_stand_in(topology):
    trunk = trainer_of(topology).trunk
    modules = {name: type(module).__mro__ for name, module in trunk.decoder.layers[0].named_modules()}
    for name, its in (("self_attention.linear_qkv", "LayerNormLinear"), ("self_attention.linear_proj", "Linear"),
                      ("self_attention.core_attention", "DotProductAttention"), ("mlp.linear_fc2", "Linear")):
        (found,) = [one for one in modules[name] if one.__module__.startswith("transformer_engine.pytorch")
                    and one.__name__ == its]
        assert "te_binding" not in sys.modules[found.__module__].__file__
    binding = sys.modules["transformer_engine_torch"].generic_gemm.__wrapped__
    assert trunk.packed and binding is te_binding.generic_gemm


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_layers_cut_a_trunk_into_the_same_pieces_and_begin_with_the_same_weights(topology, variant):
    ours, theirs = (trainer_of(topology, layers, **VARIANTS[variant]) for layers in (TE, TORCH))
    places_of = [{(piece.key, piece.shape, piece.offset, piece.size, piece.replica) for piece in pieces(one.trunk)}
                 for one in (ours, theirs)]
    assert places_of[0] == places_of[1]
    mine, yours = contents(ours), contents(theirs)
    assert mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)
    assert {(place.kind, place.layer) for place in places(ours.trunk)} == {
        (place.kind, place.layer) for place in places(theirs.trunk)}


@pytest.mark.parametrize("objective", ["clm", "mlm:0.4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_agree_with_the_torch_layers(topology, variant, objective):
    same(*(train(trainer_of(topology, layers, **VARIANTS[variant]), 2, objective) for layers in (TE, TORCH)))


@pytest.mark.parametrize(("written", "read", "variant"), [
    (TE, TORCH, {"qk_norm": True, "qkv_bias": True, "tied_embeddings": True}),
    (TORCH, TE, {"layers_without_rope": [0]}), (TE, TORCH, MODERNBERT), (TORCH, TE, {"embedding_norm": True})])
def test_a_checkpoint_goes_from_one_kind_of_layers_to_the_other(topology, tmp_path, written, read, variant):
    """With its optimizer's state."""
    first = trainer_of(topology, written, **variant)
    train(first, 2)
    path = saved(first, tmp_path / "of_training")
    assert not [name for name in stored_dtypes(path) if "_extra_state" in name]
    second = trainer_of(topology, read, seed=6, **variant)
    load(path, second.trunk, second.optimizer)
    before, after = contents(first), contents(second)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert update_count(second.optimizer) == update_count(first.optimizer) == 2
    same(train(second, 1), train(first, 1))
    fill(first.trunk, first.optimizer)  # every number another one
    load(saved(first, tmp_path / "of_numbers"), second.trunk, second.optimizer)
    assert wrong(second.trunk, second.optimizer) == [] and update_count(second.optimizer) == 7


def test_the_optimizer_is_transformer_engines_with_its_state_from_the_start(topology):
    trainer = trainer_of(topology, settings=OptimizerSettings(lr=1e-3, no_decay=["norms"]))
    (part,) = trainer.optimizer.chained_optimizers
    adam = part.optimizer
    assert type(adam).__module__ == "transformer_engine.pytorch.optimizers.fused_adam" and adam.adam_w_mode == 1
    assert {name for state in adam.state.values() for name in state} == {"exp_avg", "exp_avg_sq"}
    assert sorted(group["weight_decay"] for group in adam.param_groups) == [0.0, OptimizerSettings().weight_decay]
    held = {name: value.data_ptr() for state in local_states(trainer.optimizer).values()
            for name, value in state.tensors.items()}
    train(trainer, 3)
    assert {name: value.data_ptr() for state in local_states(trainer.optimizer).values()
            for name, value in state.tensors.items()} == held
    updates = asked("multi_tensor_adam")
    assert [one.step for one in updates] == [1, 1, 2, 2, 3, 3] and update_count(trainer.optimizer) == 3
    assert {one.parameters for one in updates} == {5, 10}  # norms; matrices, embeddings, head
    set_update_count(trainer.optimizer, 17)
    assert [group["step"] for group in adam.param_groups] == [17, 17]
    reset_moments(trainer.optimizer)
    assert update_count(trainer.optimizer) == 0 and not any(
        value.any() for state in adam.state.values() for value in state.values())


def test_an_update_is_that_of_torchs_adamw(topology):
    settings = OptimizerSettings(lr=0.01, clip_grad=0.0)
    trainer = trainer_of(topology, settings=settings)
    masters = {name: value for name, value in _masters(trainer).items()}
    twins = {name: value.clone().requires_grad_() for name, value in masters.items()}
    reference = torch.optim.AdamW(twins.values(), settings.lr, settings.betas, settings.eps, settings.weight_decay)
    for step in range(3):
        give_gradients(trainer.trunk, step)
        for place in places(trainer.trunk):
            twins[place.name].grad = place.parameter.main_grad.detach().clone().view(-1)
        set_learning_rate(trainer.optimizer, settings.lr)
        update(trainer.optimizer, gradient_norm(trainer.optimizer))
        reference.step()
    for place in places(trainer.trunk):
        torch.testing.assert_close(masters[place.name], twins[place.name].detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(place.parameter.view(-1), masters[place.name].bfloat16())  # what the layers compute with


def _masters(trainer):
    names = {place.parameter: place.name for place in places(trainer.trunk)}
    return {names[parameter]: state.tensors["param"] for parameter, state in local_states(trainer.optimizer).items()}


def test_attention_is_told_the_kind_and_the_cuts_of_each_micro_batch(topology):
    """Both kinds in one step, and a shorter micro-batch at its end."""
    trainer = trainer_of(topology)
    with on_a_gpu():
        trainer.train_step(work(MIXTURE, windows=7, micro=2), 1e-3)
    forward = asked("fused_attn_fwd")
    assert {one.mask for one in forward} == {"NVTE_PADDING_MASK", "NVTE_PADDING_CAUSAL_MASK"}
    kinds = [work(MIXTURE).objective.of_sample(3, index).attention for index in range(7)]
    windows = {mask: [len(one.cuts_q) // 3 for one in forward if one.mask == mask][::2] for mask in
               ("NVTE_PADDING_MASK", "NVTE_PADDING_CAUSAL_MASK")}  # every other: two layers each
    assert sum(windows["NVTE_PADDING_MASK"]) == kinds.count("bidirectional")
    assert sum(windows["NVTE_PADDING_CAUSAL_MASK"]) == kinds.count("causal")
    for one in forward:
        count = one.query[0] // LENGTH
        assert one.cuts_q == one.cuts_kv == [0] + [LENGTH * b + cut for b in range(count) for cut in CUTS]
        assert one.longest == (16, 16) and one.training and one.scale == pytest.approx(16**-0.5)
        assert (one.query[1:], one.key[1:]) == ((4, 16), (2, 16))
        assert one.window == ((-1, 0) if "CAUSAL" in one.mask else (-1, -1))


def test_attention_is_told_the_window_of_each_layer(topology):
    trainer = trainer_of(topology, sliding_window=3, layers_without_window=[0])
    with on_a_gpu():
        trainer.train_step(work(MIXTURE, windows=4), 1e-3)
    told = {mask: {one.window for one in asked("fused_attn_fwd") if one.mask == f"NVTE_PADDING{mask}_MASK"}
            for mask in ("", "_CAUSAL")}
    assert told == {"": {(-1, -1), (3, 3)}, "_CAUSAL": {(-1, 0), (2, 0)}}


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_what_a_token_reaches(topology, kind):
    trunk, position = trainer_of(topology, performance={"fuse_gradients": False}).trunk, 12
    tokens_BS = torch.randint(2, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    changed_BS = tokens_BS.clone()
    changed_BS[1, position] = (tokens_BS[1, position] - 1) % (VOCABULARY - 2) + 2
    cuts = torch.tensor([0, *CUTS, *(LENGTH + cut for cut in CUTS)], dtype=torch.int32)
    with on_a_gpu(), torch.no_grad():
        one, other = (trunk.hidden_states(inputs_BS, trunk.attention_context(kind, cuts, 16, True, 2, LENGTH))
                      for inputs_BS in (tokens_BS, changed_BS))
    moved = set(torch.nonzero((one - other).abs().amax((1, 2)) > 0).flatten().tolist())
    reach = range(LENGTH + (position if kind == "causal" else CUTS[0]), LENGTH + CUTS[1])
    assert moved <= set(reach) and len(moved) > len(reach) // 2


def test_gradients_are_added_in_fp32_by_the_products_themselves(topology):
    norms = []
    for fused in (True, False):
        trainer = trainer_of(topology, performance={"fuse_gradients": fused})
        calls.clear()
        norms += [norm for _, norm in train(trainer, 1)]
        added = [one for one in asked("generic_gemm") if one.out == torch.float32]
        assert len(added) == (2 * 2 * 4 if fused else 0)  # micro-batches, layers, products of a layer
        assert sum(one.accumulate for one in added) * 2 == len(added)  # the first micro-batch writes over it
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_fp8_learns_as_bf16_does_and_is_evaluated_in_bf16(topology, recipe):
    losses = {}
    for fp8 in (None, recipe):
        trainer = trainer_of(topology, precision=PrecisionSettings("bf16", fp8), settings=OptimizerSettings(lr=3e-3),
                             ffn_hidden_size=128)
        begun = {name: value.clone() for name, value in fp8_state(trainer.trunk).items()}
        losses[fp8] = [train(trainer, 10, again=True)[-1][0]]
        cast = [one for one in asked("generic_gemm") if any(one.fp8)]
        assert len(cast) == (10 * 2 * 2 * 4 * 3 if fp8 else 0) and all(all(one.fp8) for one in cast)
        calls.clear()
        losses[fp8].append(evaluate(trainer))
        assert not asked("quantize")
    assert losses[recipe] == pytest.approx(losses[None], rel=0.03) and losses[None][0] < 5.0  # from 5.9
    state = fp8_state(trainer.trunk)
    assert state.keys() == begun.keys() and len(begun) == (2 * 4 * 4 if recipe == "delayed" else 0)
    assert all(not torch.equal(state[name], begun[name]) for name in state if name.endswith("scaling_fwd.scale"))


def test_fp8_weights_are_cast_once_a_step_and_not_for_every_micro_batch(topology):
    trainer = trainer_of(topology, precision=PrecisionSettings("bf16", "current"), ffn_hidden_size=128)
    train(trainer, 3)
    kept = [one for one in asked("quantize") if not one.anew]  # into the copies of the first step
    assert len(kept) == 2 * 2 * 4  # the other steps, layers, weights of a layer; two micro-batches a step


def test_fp8_leaves_the_layers_at_the_ends_in_bf16(topology):
    precision = PrecisionSettings("bf16", "current", fp8_bf16_first=1, fp8_bf16_last=1)
    train(trainer_of(topology, precision=precision, num_layers=4, ffn_hidden_size=128), 1)
    products = [any(one.fp8) for one in asked("generic_gemm")]
    assert products.count(True) == products.count(False) == 2 * 2 * 4 * 3  # micro-batches, two layers each, products


def test_the_state_of_the_delayed_recipe_goes_through_a_checkpoint(topology, tmp_path):
    precision = PrecisionSettings("bf16", "delayed")
    first, second = (trainer_of(topology, seed=seed, precision=precision, ffn_hidden_size=128) for seed in (5, 6))
    train(first, 2)
    load(saved(first, tmp_path), second.trunk, second.optimizer)
    for name, value in fp8_state(first.trunk).items():
        assert torch.equal(fp8_state(second.trunk)[name], value), name
    assert train(second, 1) == train(first, 1)


@pytest.mark.parametrize("fp8", [None, "delayed", "current"])
def test_recomputed_layers_give_the_same_steps(topology, fp8):
    found = []
    for recompute in (None, "mlp", "full"):
        trainer = trainer_of(topology, precision=PrecisionSettings("bf16", fp8), ffn_hidden_size=128,
                             performance={"recompute": recompute})
        calls.clear()
        found.append(train(trainer, 2))
        again = {None: 0, "mlp": 2, "full": 4}[recompute]  # products of a layer
        assert len(asked("generic_gemm")) == 2 * 2 * 2 * (3 * 4 + again)  # steps, micro-batches, layers
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("recompute", [None, "full"])
def test_what_is_frozen_stays_to_the_bit_and_its_gradients_are_not_computed(topology, recompute):
    frozen, steps = Frozen(embeddings=True, layers=frozenset({0})), {}
    for layers in (TE, TORCH):
        trainer = trainer_of(topology, layers, performance={"recompute": recompute},
                             settings=OptimizerSettings(name="stable_adamw", lr=1e-3))
        freeze(trainer.ddp, trainer.optimizer, frozen)
        before = contents(trainer)
        held = {key for key in before if "embedding" in key[0] or "decoder.layers" in key[0] and key[1][0] == 0}
        calls.clear()
        steps[layers] = train(trainer, 2)
        after = contents(trainer)
        assert all(torch.equal(after[key], before[key]) for key in held)
        if layers == TE and recompute is None:
            assert len([one for one in asked("generic_gemm") if one.out == torch.float32]) == 2 * 2 * 4  # of layer 1
        freeze(trainer.ddp, trainer.optimizer, Frozen())
        train(trainer, 1)
        freed = contents(trainer)
        for key, value in before.items():
            if key[0].startswith("optimizer.state"):  # bf16 rounds small moves of the weights away
                assert torch.equal(after[key], value) == (key in held) and not torch.equal(freed[key], after[key]), key
    same(steps[TE], steps[TORCH])


TWO_RANKS = """
import json, os, sys
from pathlib import Path
import te_binding
import test_te_python as here
topology = here.forked_ranks()
folder, said = Path(sys.argv[1]), {}
for name, (fp8, model) in json.loads(sys.argv[2]).items():
    trainer = here.trainer_of(topology, sequence=True, precision=here.PrecisionSettings("bf16", fp8), **model)
    here.load(folder / name / "checkpoints" / "step_00000001", trainer.trunk, trainer.optimizer)
    said[name] = here.train(trainer, 2)
    here.saved(trainer, folder / f"{name}_back")
(folder / f"rank{topology.rank}").write_text(json.dumps(said))
here.leave()
"""


def forked_ranks():
    """This process and a fork of it as two tensor ranks: one import for both, and nothing has started a thread."""
    trunks.choose_layers = lambda wanted, *_others: wanted
    rank = str(int(not os.fork()))
    os.environ.update(RANK=rank, LOCAL_RANK=rank)
    return distributed.initialize(tensor=2)


def leave():
    """Both ranks' end; the exit code is 0 if both ended well."""
    distributed.shutdown()
    os._exit(int(os.environ["RANK"] == "0" and os.wait()[1] != 0))


def test_two_tensor_ranks_with_sequence_parallelism_take_the_same_steps(topology, tmp_path):
    """From a checkpoint of one rank, and back to one rank; norms' gradients are summed over the ranks."""
    cases = {"plain": (None, {"ffn_hidden_size": 128}),
             "all": (None, {"qk_norm": True, "qkv_bias": True, "tied_embeddings": True, "layers_without_rope": [0]}),
             "modernbert": (None, MODERNBERT), "delayed": ("delayed", {"ffn_hidden_size": 128}),
             "current": ("current", {"ffn_hidden_size": 128})}
    alone = {name: trainer_of(topology, precision=PrecisionSettings("bf16", fp8), **model)
             for name, (fp8, model) in cases.items()}
    for name, trainer in alone.items():
        saved(trainer, tmp_path / name)
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    subprocess.run([sys.executable, "-c", TWO_RANKS, str(tmp_path), json.dumps(cases)], check=True, timeout=300, env={
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])})
    ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for name, trainer in alone.items():
        same(ranks[0][name], train(trainer, 2), *((1e-2, 5e-2) if cases[name][0] else ()))  # FP8: a scale a shard
        load(tmp_path / f"{name}_back" / "checkpoints" / "step_00000001", trainer.trunk, trainer.optimizer)
        assert update_count(trainer.optimizer) == 2


def test_the_wheel_without_its_kernels_is_no_harm_and_is_named():
    """As after `pip install transformer-engine` alone; megatron.core catches none of what its import raises."""
    code = """
from megatron_encdec.platform.optional import keep_out_unusable, why_unusable
keep_out_unusable(on_gpu=True)
import sys
print(why_unusable("transformer_engine.pytorch"), sys.modules["transformer_engine"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "broken (RuntimeError: Found empty `transformer-engine` meta package" in done.stdout
    assert done.stdout.endswith(" None\n")
