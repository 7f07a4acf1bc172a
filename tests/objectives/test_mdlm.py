import numpy as np
import pytest

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Vocabulary, collate
from megatron_encdec.objectives.mdlm import MDLM, diffusion_time
from megatron_encdec.objectives.mlm import MLM

TOKENS = Vocabulary(500, frozenset({0, 2}), 1)


def window(index, size=64):
    tokens_S = np.random.default_rng(index).integers(0, 500, size)
    return Sample(index, 0, 0, 0, tokens_S, np.array([size]))


def test_it_is_mlm_at_the_samples_own_ratio_weighted_by_its_inverse():
    for index in range(100):
        time = diffusion_time(3, index)
        ours, theirs = MDLM().apply(window(index), 3, TOKENS), MLM(time).apply(window(index), 3, TOKENS)
        for name in ("inputs_S", "positions_N", "labels_N"):
            assert (getattr(ours, name) == getattr(theirs, name)).all()
        assert ours.weights_N.dtype == np.float32
        assert ours.weights_N == pytest.approx(np.full(len(ours.labels_N), 1 / time), rel=1e-6)
        assert ours.weight == (~np.isin(window(index).tokens_S, [0, 1, 2])).sum()


def test_times_are_uniform_and_the_estimate_is_unbiased():
    times = np.array([diffusion_time(3, index) for index in range(4000)])
    assert 1e-3 <= times.min() < 5e-3 and 0.995 < times.max() < 1
    counts = np.histogram(times, 10, (1e-3, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 34  # 9 degrees of freedom, p = 1e-4
    # where every token costs the same, the bound is that cost: masked / t over the maskable ones is 1 on average
    ratios = [one.weights_N.sum() / one.weight for one in (MDLM().apply(window(i), 3, TOKENS) for i in range(4000))]
    assert abs(np.mean(ratios) - 1) < 4 * np.std(ratios) / len(ratios) ** 0.5
    assert len({diffusion_time(seed, 0) for seed in range(9)}) == 9


def test_a_micro_batch_carries_weights_and_what_to_divide_by():
    batch = collate(MDLM(), [window(0), window(1)], 3, TOKENS)
    alone = [MDLM().apply(window(index), 3, TOKENS) for index in (0, 1)]
    assert (batch.weights_N == np.concatenate([one.weights_N for one in alone])).all()
    assert batch.weight == sum(one.weight for one in alone)
    plain = collate(MLM(), [window(0)], 3, TOKENS)
    assert plain.weights_N is None and plain.weight == len(plain.labels_N)
