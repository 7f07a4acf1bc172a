import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Vocabulary
from megatron_encdec.objectives.clm import CLM

ANY = Vocabulary(100)


def sample(tokens, ends, index=0):
    return Sample(index, 0, 0, 0, np.array(tokens), np.array(ends))


def test_predicts_the_next_token_inside_each_segment():
    labelled = CLM().apply(sample([10, 11, 12, 13, 14, 15], [2, 3, 6]), 0, ANY)
    assert labelled.inputs_S.tolist() == [10, 11, 12, 13, 14, 15]
    assert labelled.positions_N.tolist() == [0, 3, 4]  # none at 1, 2 and 5: the last of a segment
    assert labelled.labels_N.tolist() == [11, 14, 15]
    assert CLM().attention == "causal"


def test_no_target_crosses_a_segment_for_random_cuts():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ends = [*sorted(rng.choice(np.arange(1, 40), rng.integers(0, 30), replace=False)), 40]
        segment_S = np.searchsorted(ends, np.arange(40), side="right")
        labelled = CLM().apply(sample(np.arange(40), ends), 0, ANY)
        assert (segment_S[labelled.positions_N] == segment_S[labelled.labels_N]).all()  # label = its position
        assert (labelled.labels_N == labelled.positions_N + 1).all()
        assert len(labelled.labels_N) == 40 - len(ends)


def test_segments_of_one_token_give_no_target():
    labelled = CLM().apply(sample([1, 2, 3], [1, 2, 3]), 0, ANY)
    assert labelled.positions_N.size == labelled.labels_N.size == 0
