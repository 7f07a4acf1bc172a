import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Vocabulary, collate
from megatron_encdec.objectives.clm import CLM
from megatron_encdec.objectives.mlm import MLM

S = 8
TOKENS = Vocabulary(200, mask_id=0)
TOKENS_BS = np.arange(3 * S).reshape(3, S) + 100
ENDS = [[8], [3, 8], [1, 2, 8]]


def samples(ends=ENDS, tokens_BS=TOKENS_BS):
    return [Sample(40 + b, 0, 0, 0, tokens_BS[b], np.array(ends[b])) for b in range(len(ends))]


def test_clm_labels_stand_at_flat_positions():
    batch = collate(CLM(), samples(), 0, TOKENS)
    assert (batch.inputs_BS == TOKENS_BS).all() and batch.inputs_BS.dtype == np.int64
    assert (batch.labels_N == TOKENS_BS.ravel()[batch.label_positions_N] + 1).all()
    assert batch.label_positions_N.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 14, 18, 19, 20, 21, 22]
    assert (batch.attention, batch.samples) == ("causal", (40, 41, 42))


def test_mlm_labels_stand_at_flat_positions():
    objective = MLM(0.5)
    batch = collate(objective, samples(), 3, TOKENS)
    assert batch.attention == "bidirectional"
    assert (batch.labels_N == TOKENS_BS.ravel()[batch.label_positions_N]).all()
    assert (np.flatnonzero(batch.inputs_BS.ravel() == 0) == batch.label_positions_N).all()
    for b, one in enumerate(samples()):  # a sample's mask does not depend on its neighbours
        alone = collate(objective, [one], 3, TOKENS)
        inside = batch.label_positions_N // S == b
        assert (batch.label_positions_N[inside] - b * S == alone.label_positions_N).all()


def test_segments_become_cumulative_lengths():
    batch = collate(CLM(), samples(), 0, TOKENS)
    assert batch.cu_seqlens.dtype == np.int32
    assert batch.cu_seqlens.tolist() == [0, 8, 11, 16, 17, 18, 24]
    assert (batch.longest, batch.isolated) == (8, True)
    whole = collate(CLM(), samples([[8], [8]]), 0, TOKENS)
    assert (whole.cu_seqlens.tolist(), whole.longest, whole.isolated) == ([0, 8, 16], 8, False)


def test_a_micro_batch_without_any_label():
    batch = collate(MLM(0.5), samples([[8], [8]], np.zeros((2, S), dtype=np.int64)), 0, TOKENS)
    assert batch.labels_N.shape == batch.label_positions_N.shape == (0,)
    assert batch.labels_N.dtype == np.int64
