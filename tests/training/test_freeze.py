"""What a phase freezes stays as it is to the bit, however the run is spread or stopped, and trains on once freed."""

import pytest
import torch
from random_models import MODERNBERT
from small_run import config_of, metrics, outcome, run_cli

from megatron_encdec.engine.boxes import Box
from megatron_encdec.engine.storage import read_boxes
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.restricted_pickle import load_records
from megatron_encdec.training.layout import lay_out

FROZEN = ("phases=[{name: all, objective: clm, steps: 4}, "
          "{name: upper, objective: {name: mlm, mask_ratio: 0.3}, steps: 4, freeze: [embeddings, layers 0]}, "
          "{name: freed, objective: {name: mlm, mask_ratio: 0.3}, steps: 4, freeze: []}]")
FREE = FROZEN.replace(", freeze: [embeddings, layers 0]", "").replace(", freeze: []", "")
TOPOLOGIES = {"dp2": ("--nproc", "2"), "tp2": ("--nproc", "2", "parallel.tensor=2", "parallel.sequence=true"),
              "pp2": ("--nproc", "2", "parallel.pipeline=2"),  # the first stage is frozen, all of it
              "recompute": ("performance.recompute=full",)}


@pytest.fixture(scope="module")
def frozen(root, tmp_path_factory):
    """A run with a frozen phase between two others. Only to be read."""
    run = tmp_path_factory.mktemp("frozen") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", FROZEN)
    return run


def tensors(run, step: int) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, weights and optimizer state by name."""
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    boxes = [Box(name, tuple(about.size), (0,) * len(about.size), torch.empty(about.size, dtype=about.properties.dtype))
             for name, about in load_records(checkpoint / ".metadata").state_dict_metadata.items()]
    read_boxes(checkpoint, boxes)
    return {box.key: box.values for box in boxes}


def test_frozen_stays_and_all_else_moves(frozen):
    before, after, freed = (tensors(frozen, step) for step in (4, 8, 12))
    for name, values in before.items():
        pairs = [(values, after[name], freed[name], "embedding" in name)]
        if "decoder.layers" in name:  # stacked: the layer's number comes first
            pairs = [(values[layer], after[name][layer], freed[name][layer], layer == 0) for layer in (0, 1)]
        for then, now, later, held in pairs:
            assert torch.equal(then, now) == held, name
            assert not torch.equal(now, later), name


def test_the_forward_pass_is_the_same_and_the_norm_leaves_it_out(frozen, pretrain):
    ours, theirs = metrics(frozen), metrics(pretrain("free", FREE))
    assert ours[:4] == [line | {"phase": "all"} for line in theirs[:4]]
    assert ours[4]["loss"] == theirs[4]["loss"] and ours[5]["loss"] != theirs[5]["loss"]
    assert ours[4]["grad_norm"] < 0.99 * theirs[4]["grad_norm"]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_agrees_however_it_is_spread(name, frozen, pretrain):
    for ours, theirs in zip(metrics(pretrain(name, FROZEN, *TOPOLOGIES[name])), metrics(frozen), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]


def test_goes_on_exactly(frozen, pretrain):
    for step in ("4", "6", "10"):
        pretrain("stopped", FROZEN, "--until", step)
    assert outcome(pretrain("stopped", FROZEN)) == outcome(frozen)
    pretrain("child", FROZEN, "--fork", f"{frozen}@4", "--until", "6")
    assert metrics(pretrain("child", FROZEN)) == metrics(frozen)[4:]


def test_bf16_stable_adamw_on_two_ranks_goes_on_exactly(pretrain):
    """Masters apart from the weights; tied embeddings on both stages."""
    options = (FROZEN, "precision.dtype=bf16", "model.tied_embeddings=true", "optimizer.name=stable_adamw", "--nproc",
               "2", "parallel.pipeline=2")
    whole = pretrain("whole", *options)
    pretrain("stopped", *options, "--until", "6")
    assert outcome(pretrain("stopped", *options)) == outcome(whole)
    before, after = tensors(whole, 4), tensors(whole, 8)
    held = [name for name in before if torch.equal(before[name], after[name])]
    assert sorted(held) == [f"{prefix}embedding.word_embeddings.weight" for prefix in (
        "", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.param.")]


@pytest.mark.parametrize(("change", "error"), [
    ("phases.1.freeze=[layers 2]", "phases.1.freeze: there is no layer 2; the trunk has the layers 0-1"),
    ("phases.1.freeze=[layer 1]", "phases.1.freeze: 'layer 1' is not one of"),
    ("phases.1.freeze=[embeddings, head, layers 0-1]", "phases.1.freeze: .* is the whole trunk"),
])
def test_what_cannot_be_frozen(change, error):
    with pytest.raises(UserError, match=error):
        lay_out(config_of(change))


def test_a_list_holds_until_the_next():
    stretches = lay_out(config_of(FROZEN.replace(", freeze: []", "")))
    assert [stretch.freeze.words for stretch in stretches] == [[], *[["embeddings", "layers 0"]] * 2]


def test_a_dense_head_and_the_embeddings_norm_are_parts_of_their_own(pretrain):
    """Tied: `head` is the layer before the output matrix and the bias behind it; the norm goes with the embeddings."""
    phases = ("phases=[{name: one, objective: mlm:0.3, steps: 2}, {name: head, objective: mlm:0.3, steps: 2, freeze: "
              "[head]}, {name: embeddings, objective: mlm:0.3, steps: 2, freeze: [embeddings, layers 1]}]")
    shape = "{" + ", ".join(f"{key}: {value}" for key, value in {
        **MODERNBERT, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
        "num_query_groups": 4}.items()).lower() + "}"
    run = pretrain("run", phases, f"model={shape}")
    states = [tensors(run, step) for step in (2, 4, 6)]
    of_head = {"prediction_head.dense.weight", "prediction_head.norm.weight", "output_layer.bias"}
    norm = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"  # of layer 0: the embeddings'
    weights = [name for name in states[0] if not name.startswith("optimizer.")]
    assert of_head < set(weights) and norm in weights
    for name in weights:
        first, second, third = (state[name] for state in states)
        assert torch.equal(first, second) == (name in of_head), name
        if "decoder.layers" in name:
            assert torch.equal(second[1], third[1]), name
            assert torch.equal(second[0], third[0]) == (name == norm), name
        else:
            assert torch.equal(second, third) == (name not in of_head), name  # the final norm goes with layer 1
    lines = metrics(pretrain("pp2", phases, f"model={shape}", "--nproc", "2", "parallel.pipeline=2"))
    for ours, theirs in zip(lines, metrics(run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]
