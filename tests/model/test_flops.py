"""The FLOP count against torch's own counter, which sees every product that is really done."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_encdec.data.samples import Sample
from megatron_encdec.model.blocks import Blocks, reach, segment_mask
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.flops import attended_pairs, training_flops, whole_pairs
from megatron_encdec.model.parts import Frozen
from megatron_encdec.model.performance import PerformanceSettings
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.objectives.base import Objective, Vocabulary, collate

LENGTH, WINDOWS = 96, 2
MODEL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, num_query_groups=2,
                    vocabulary_size=384)


def counted(topology, objective: str, ends: list[int], model=MODEL) -> tuple[float, float, float]:
    """(torch's count of a forward and backward pass, of which attention, ours); segments end at `ends`."""
    samples = [Sample(i, 0, 0, i, np.random.default_rng(i).integers(2, 300, LENGTH), np.array(ends))
               for i in range(WINDOWS)]
    batch = collate(Objective.from_yaml(objective, "objective"), samples, 0, Vocabulary(384, frozenset({0}), 1))
    trunk = build_trunk(model, topology, torch.float32, LENGTH, seed=1,
                        performance=PerformanceSettings(attention="packed"))
    inputs, cuts, positions, labels = (torch.from_numpy(array) for array in (
        batch.inputs_BS, batch.cu_seqlens, batch.label_positions_N, batch.labels_N))
    context = trunk.attention_context(batch.attention, cuts, batch.longest, batch.isolated, WINDOWS, LENGTH)
    # attention as plain products: the counter does not know the CPU's fused kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trunk(inputs, context, positions, labels, summed=True).backward()
    attention = sum(flops for operator, flops in counter.get_flop_counts()["Global"].items()
                    if "bmm" in str(operator))
    return counter.get_total_flops(), attention, training_flops(
        model, inputs.numel(), attended_pairs(batch.cu_seqlens, batch.attention, model.sliding_window), len(labels))


@pytest.mark.parametrize("objective", ["mlm:0.15", "mlm:0.4"])
@pytest.mark.parametrize("ends", [[LENGTH], [10, 64, LENGTH]], ids=["whole", "isolated"])
def test_bidirectional(topology, objective, ends):
    theirs, attention, ours = counted(topology, objective, ends)
    assert attention > 0.05 * theirs
    assert ours == pytest.approx(theirs, rel=0.02)


def test_the_dense_head(topology):
    """The same trunk without it needs as much less as is counted; attention within windows is not computed exactly."""
    linear, dense = (dataclasses.replace(MODEL, tied_embeddings=True, norm="layernorm", activation="geglu",
                                         embedding_norm=True, prediction_head=head) for head in ("linear", "dense"))
    without, _, fewer = counted(topology, "mlm:0.4", [LENGTH], linear)
    theirs, _, ours = counted(topology, "mlm:0.4", [LENGTH], dense)
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours - fewer == pytest.approx(theirs - without, rel=1e-6) and ours > fewer


@pytest.mark.parametrize("ends", [[LENGTH], [10, 64, LENGTH]], ids=["whole", "isolated"])
def test_causal_attention_counts_half(topology, ends):
    theirs, attention, ours = counted(topology, "clm", ends)
    assert ours == pytest.approx(theirs - attention / 2, rel=0.02)


def test_parts_add_up():
    pairs = whole_pairs(1000, 50, "bidirectional")
    assert pairs[0] == 50 * 1000 and (whole_pairs(1000, 50, "causal") == pairs / 2).all()
    assert attended_pairs(np.array([0, 3, 10]), "bidirectional").tolist() == [9 + 49] * 2
    assert attended_pairs(np.array([0, 3, 10]), "causal").tolist() == [(9 + 49) / 2] * 2
    trunk = training_flops(MODEL, 1000, pairs, 0)
    assert training_flops(MODEL, 1000, pairs, 30) - trunk == 3 * 2 * 64 * 384 * 30
    assert trunk - training_flops(MODEL, 1000, (0, 0), 0) == 3 * 2 * 4 * 64 * pairs[0]  # layers, heads x head dimension


@pytest.mark.parametrize("window", [1, 2, 5, 30, 31, 90])
def test_pairs_within_a_window_are_those_that_the_mask_lets_through(window):
    cuts = torch.tensor([0, 1, 8, 40, 64], dtype=torch.int32)
    for kind in ("causal", "bidirectional"):
        mask = segment_mask(cuts, 1, 64, reach(kind, window), Blocks(64), torch.float32)
        seen = int((mask == 0).sum())
        expected = seen - 64 / 2 if kind == "causal" else seen  # causal counts half of a band that is symmetric
        assert attended_pairs(cuts.numpy(), kind, window)[1] == expected
        assert attended_pairs(cuts.numpy(), kind, window)[0] == attended_pairs(cuts.numpy(), kind)[1]


def test_each_layer_counts_its_own_pairs():
    mixed = dataclasses.replace(MODEL, num_layers=5, sliding_window=8, layers_without_window=[0, 3])
    attention = training_flops(mixed, 0, (100, 7), 0)
    assert attention == 3 * 4 * 64 * (2 * 100 + 3 * 7)
    frozen = Frozen(embeddings=True, layers=frozenset({0, 1}))  # no gradient passes those two
    assert attention - training_flops(mixed, 0, (100, 7), 0, frozen) == 2 * 4 * 64 * (100 + 7)
