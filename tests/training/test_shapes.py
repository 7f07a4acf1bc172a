"""Trunks of the shapes that imports bring, through runs: the same numbers however a run is split, stopped or done."""

import pytest
from small_run import metrics, outcome, run_cli

_SIZES = "num_layers: 4, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, num_query_groups: 2"
SHAPES = {
    "gemma": "norm_place: both, norm_zero_centered: true, activation: geglu_tanh, embedding_multiplier: 5.5, "
             "attention_multiplier: 0.3, attention_softcap: 2.0, logits_softcap: 3.0, tied_embeddings: true, "
             "sliding_window: 5, layers_without_window: [0, 3], local_rope_theta: 40.0",
    "olmo": "norm_place: after, qk_norm: true, qk_norm_over: heads",
    "granite": "embedding_multiplier: 3.0, residual_multiplier: 0.4, attention_multiplier: 0.5, logits_scaling: 2.0, "
               "qkv_bias: true, attention_output_bias: true"}
PHASES = "phases=[{name: causal, objective: clm, steps: 4}, {name: masked, objective: mlm:0.3, steps: 4}]"
TOPOLOGIES = {
    "tp2": ("--nproc", "2", "parallel.tensor=2"),
    "tp2_sequence": ("--nproc", "2", "parallel.tensor=2", "parallel.sequence=true"),
    "pp2": ("--nproc", "2", "parallel.pipeline=2"),
    "recompute_packed": ("performance.recompute=full", "performance.attention=packed", "performance.head_chunk=64")}


def model(shape):
    return f"model={{{_SIZES}, {SHAPES[shape]}}}"


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """Shape -> its run on one process. Only to be read."""
    found = {}
    for shape in SHAPES:
        found[shape] = tmp_path_factory.mktemp(shape) / "run"
        run_cli("pretrain", root / "config.yaml", f"run.dir={found[shape]}", model(shape), PHASES)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_learns(alone, shape):
    losses = [line["loss"] for line in metrics(alone[shape])]
    assert losses[3] < losses[0] and losses[7] < losses[4]


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_however_it_is_computed(name, shape, alone, pretrain):
    run = pretrain(f"{shape}_{name}", model(shape), PHASES, *TOPOLOGIES[name])
    for ours, theirs in zip(metrics(run), metrics(alone[shape]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]


@pytest.mark.parametrize("shape", SHAPES)
def test_goes_on_exactly_and_on_another_topology(shape, alone, pretrain):
    pretrain(f"{shape}_stopped", model(shape), PHASES, "--until", "5")
    assert outcome(pretrain(f"{shape}_stopped", model(shape), PHASES)) == outcome(alone[shape])
    two = ("--nproc", "2", "parallel.tensor=2", "parallel.sequence=true")
    pretrain(f"{shape}_split", model(shape), PHASES, "--until", "5", *two)
    for ours, theirs in zip(metrics(pretrain(f"{shape}_split", model(shape), PHASES)), metrics(alone[shape]),
                            strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]


def test_zero_centred_norms_move_from_one(pretrain):
    """Their weights begin at 0, what they multiply by at 1."""
    for line in metrics(pretrain("distance", model("gemma"), PHASES, "logging.distance=true"), "phase"):
        assert 0 < line["distance"]["norm"] < 0.2
