import numpy as np
import pytest

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Vocabulary
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.platform.errors import UserError

S, VOCABULARY, MASK, SPECIAL = 512, 1000, 999, [0, 1, 2]
SEED = 11
TOKENS = Vocabulary(VOCABULARY, frozenset(SPECIAL), MASK)


def window(index, tokens=None):
    if tokens is None:
        tokens = np.random.default_rng(index).integers(0, VOCABULARY - 1, S)
    return Sample(index, 0, 0, 0, np.asarray(tokens), np.array([len(tokens)]))


def mlm(ratio=0.3, **fractions):
    return MLM(ratio, **fractions)


def chosen(objective, repeats, tokens):
    """Whether each position was chosen, in `repeats` samples of the same tokens."""
    table = np.zeros((repeats, len(tokens)), dtype=bool)
    for i in range(repeats):
        table[i, objective.apply(window(i, tokens), SEED, TOKENS).positions_N] = True
    return table


def test_labels_and_inputs():
    one = window(3)
    before = one.tokens_S.copy()
    labelled = mlm().apply(one, SEED, TOKENS)
    positions_N = labelled.positions_N
    assert (one.tokens_S == before).all()  # the sample is not changed
    assert (np.diff(positions_N) > 0).all() and 0 < len(positions_N) < S
    assert (labelled.labels_N == before[positions_N]).all()
    assert (labelled.inputs_S[positions_N] == MASK).all()
    untouched = np.delete(np.arange(S), positions_N)
    assert (labelled.inputs_S[untouched] == before[untouched]).all()


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4, 0.9])
def test_ratio_is_binomial_and_uniform_over_positions(ratio):
    repeats = 1500
    table = chosen(mlm(ratio), repeats, np.full(64, 7))
    deviation = (ratio * (1 - ratio) * table.size) ** 0.5
    assert abs(table.sum() - ratio * table.size) < 4 * deviation
    expected = repeats * ratio
    chi_square = ((table.sum(0) - expected) ** 2 / (expected * (1 - ratio))).sum()
    assert 25 < chi_square < 115  # 64 degrees of freedom, p = 1e-5 and 1 - 1e-5, about
    per_window = table.sum(1)
    assert abs(per_window.var() / (64 * ratio * (1 - ratio)) - 1) < 0.2  # i.i.d.: the number varies so
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 4 / table.size**0.5


def test_special_tokens_are_never_masked():
    tokens = np.tile([0, 1, 2, MASK, 7], 100)
    for i in range(50):
        labelled = mlm(0.9).apply(window(i, tokens), SEED, TOKENS)
        assert set(labelled.labels_N.tolist()) == {7}


def test_a_window_of_special_tokens_has_no_label_and_no_error():
    for fractions in ({}, {"mask_fraction": 0.8, "random_fraction": 0.1}):
        labelled = mlm(0.9, **fractions).apply(window(0, [0, 1, 2, MASK] * 4), SEED, TOKENS)
        assert labelled.positions_N.size == labelled.labels_N.size == 0
        assert labelled.labels_N.dtype == labelled.positions_N.dtype == np.int64
        assert labelled.inputs_S.tolist() == [0, 1, 2, MASK] * 4


def test_masks_are_nested_across_ratios_and_paired_across_fractions():
    for i in range(20):
        low, high = (mlm(ratio).apply(window(i), SEED, TOKENS).positions_N for ratio in (0.2, 0.5))
        assert set(low) < set(high)
        other = mlm(0.5, mask_fraction=0.8, random_fraction=0.1).apply(window(i), SEED, TOKENS)
        assert (other.positions_N == high).all()


def test_masks_are_paired_between_samples_with_different_tokens():
    one, two = (mlm().apply(window(4, np.full(S, token)), SEED, TOKENS).positions_N for token in (5, 6))
    assert (one == two).all()


def test_same_twice_and_different_for_another_sample_or_seed():
    tokens = window(0).tokens_S  # a second epoch is the same window under another sample number
    first = mlm().apply(window(0, tokens), SEED, TOKENS)
    mlm().apply(window(9), SEED, TOKENS)
    again = mlm().apply(window(0, tokens), SEED, TOKENS)
    assert (first.inputs_S == again.inputs_S).all() and (first.positions_N == again.positions_N).all()
    for other in (mlm().apply(window(77, tokens), SEED, TOKENS), mlm().apply(window(0, tokens), SEED + 1, TOKENS)):
        shared = len(set(first.positions_N) & set(other.positions_N)) / len(first.positions_N)
        assert 0.15 < shared < 0.45  # by chance: the ratio, 0.3


def test_mask_random_keep_proportions():
    objective = mlm(0.5, mask_fraction=0.8, random_fraction=0.1)
    kinds, drawn = np.zeros(3), []
    for i in range(400):
        labelled = objective.apply(window(i, np.full(S, 7)), SEED, TOKENS)
        inputs_N = labelled.inputs_S[labelled.positions_N]
        replaced = (inputs_N != MASK) & (inputs_N != 7)
        kinds += [(inputs_N == MASK).sum(), replaced.sum(), (inputs_N == 7).sum()]
        drawn.append(inputs_N[replaced])
    total = kinds.sum()
    for count, share in zip(kinds, (0.8, 0.1, 0.1), strict=True):
        assert abs(count - share * total) < 4 * (share * (1 - share) * total) ** 0.5 + 0.1 / 900 * total
    drawn = np.concatenate(drawn)
    assert not np.isin(drawn, [*SPECIAL, MASK]).any()
    assert drawn.min() < 20 and drawn.max() > VOCABULARY - 20
    tenths = np.bincount((drawn - 3) * 10 // 996, minlength=10)
    assert ((tenths - len(drawn) / 10) ** 2 / (len(drawn) / 10)).sum() < 34  # 9 degrees of freedom, p = 1e-4


def test_data_of_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="sample 6 holds token id 5000, outside .* 1000"):
        mlm().apply(window(6, [1, 5000]), SEED, TOKENS)
