import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Vocabulary
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.objectives.mntp import MNTP

TOKENS = Vocabulary(500, frozenset({0}), 1)


def test_masks_are_those_of_mlm_without_the_first_of_a_segment_predicted_one_position_before():
    draw = np.random.default_rng(0)
    for index in range(100):
        ends = [*sorted(draw.choice(np.arange(1, 64), draw.integers(0, 9), replace=False)), 64]
        sample = Sample(index, 0, 0, 0, draw.integers(0, 500, 64), np.array(ends))
        settings = {"mask_ratio": 0.5, "mask_fraction": 0.8, "random_fraction": 0.1}
        ours, theirs = (kind(**settings).apply(sample, 3, TOKENS) for kind in (MNTP, MLM))
        kept = ~np.isin(theirs.positions_N, [0, *ends])
        assert (ours.positions_N + 1 == theirs.positions_N[kept]).all()
        assert (ours.labels_N == theirs.labels_N[kept]).all()
        segment_S = np.searchsorted(ends, np.arange(64), side="right")
        assert (segment_S[ours.positions_N] == segment_S[ours.positions_N + 1]).all()
        hidden_N = ours.positions_N + 1
        assert (ours.inputs_S[hidden_N] == theirs.inputs_S[hidden_N]).all()
        untouched = np.delete(np.arange(64), hidden_N)
        assert (ours.inputs_S[untouched] == sample.tokens_S[untouched]).all()
    assert (MNTP.attention, MNTP.predicts, MNTP.hides) == ("bidirectional", 1, True)
