"""Objectives in turn and side by side."""

import numpy as np
import pytest

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.alternate import Alternate, Turn
from megatron_encdec.objectives.base import Vocabulary, collate, filler
from megatron_encdec.objectives.clm import CLM
from megatron_encdec.objectives.masking import Ramp
from megatron_encdec.objectives.mdlm import MDLM
from megatron_encdec.objectives.mixture import Mixture, Part
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.platform.errors import UserError

TOKENS = Vocabulary(500, frozenset({0, 2}), 1)


def window(index, size=32):
    return Sample(index, 0, 0, 0, np.random.default_rng(index).integers(3, 500, size), np.array([10, size]))


def test_turns_follow_one_another_and_begin_again():
    objective = Alternate((Turn(CLM(), 2), Turn(MLM(0.4), 3), Turn(MDLM(), 1)))
    names = [objective.at(step, 14).name for step in range(1, 15)]
    assert names == ["clm"] * 2 + ["mlm"] * 3 + ["mdlm"] + ["clm"] * 2 + ["mlm"] * 3 + ["mdlm"] + ["clm"] * 2
    assert objective.at(3, 14) == MLM(0.4)


def test_a_ratio_changes_over_the_phase_whatever_the_turns():
    objective = Alternate((Turn(CLM(), 1), Turn(MLM(Ramp(0.4, 0.2)), 1)))
    ratios = [objective.at(step, 11).mask_ratio for step in range(2, 12, 2)]
    assert ratios == pytest.approx([0.38, 0.34, 0.30, 0.26, 0.22])
    mixture = Mixture((Part(MLM(Ramp(0.4, 0.2)), 1),))
    assert mixture.at(11, 11) == Mixture((Part(MLM(0.2), 1),))


def test_samples_are_drawn_in_proportion_and_independently():
    mixture = Mixture((Part(MLM(), 15), Part(CLM(), 1)))
    causal = np.array([mixture.of_sample(9, index) == CLM() for index in range(20_000)])
    assert abs(causal.mean() - 1 / 16) < 4 * (15 / 256 / len(causal)) ** 0.5
    for step in (1, 2, 3, 8):
        assert abs(np.corrcoef(causal[:-step], causal[step:])[0, 1]) < 4 / len(causal) ** 0.5
    assert [mixture.of_sample(9, index) == CLM() for index in (5, 17, 3)] == causal[[5, 17, 3]].tolist()
    other = np.array([mixture.of_sample(10, index) == CLM() for index in range(20_000)])
    assert abs((causal & other).mean() - 1 / 256) < 4 / 16 / len(causal) ** 0.5


def test_a_samples_draw_is_its_parts_own():
    mixture = Mixture((Part(MDLM()), Part(CLM()), Part(MLM(0.2))))
    for index in range(20):
        part = mixture.of_sample(3, index)
        ours, alone = (one.apply(window(index), 3, TOKENS) for one in (mixture, part))
        assert (ours.inputs_S == alone.inputs_S).all() and (ours.positions_N == alone.positions_N).all()


def test_what_follows_from_the_parts():
    causal, both = Mixture((Part(CLM()),)), Mixture((Part(CLM()), Part(MLM())))
    assert (causal.hides, causal.attention) == (False, "causal") and (both.hides, both.attention) == (
        True, "bidirectional")
    assert both.shares() == [(0.5, CLM()), (0.5, MLM())]
    words = Alternate((Turn(CLM(), 1), Turn(MLM(unit="word"), 1)))
    assert words.by_words and not both.by_words
    with pytest.raises(UserError, match=r"^phases.0.objective.cycle.1.objective.unit: word, but"):
        words.check(TOKENS, "phases.0.objective")


def test_weights_of_a_micro_batch_of_several_objectives_and_filler():
    mixture = Mixture((Part(MDLM()), Part(MLM(0.2))))
    samples = [window(index) for index in range(12)]
    batch = collate(mixture, [*samples, filler(32), filler(32)], 3, TOKENS)
    assert (batch.samples, batch.attention) == (tuple(range(12)), "bidirectional") and batch.inputs_BS.shape == (14, 32)
    assert batch.label_positions_N.max() < 12 * 32 and batch.cu_seqlens[-3:].tolist() == [384, 416, 448]
    alone = [mixture.of_sample(3, one.index).apply(one, 3, TOKENS) for one in samples]
    assert {one.weights_N is None for one in alone} == {True, False}
    weights_N = np.concatenate([np.ones(len(one.labels_N)) if one.weights_N is None else one.weights_N
                                for one in alone])
    assert batch.weights_N == pytest.approx(weights_N) and batch.weight == sum(one.weight for one in alone)
    nothing = collate(mixture, [filler(32)], 3, TOKENS)
    assert (nothing.samples, nothing.weight, nothing.labels_N.size, nothing.isolated) == ((), 0, 0, False)
