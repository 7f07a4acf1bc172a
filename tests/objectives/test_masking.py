"""Words, spans and ratios that change: what is masked follows the law of the docstring, nested across ratios."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Vocabulary
from megatron_encdec.objectives.masking import Ramp, in_spans
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.objectives.mntp import MNTP
from megatron_encdec.platform.errors import UserError

S, SIZE, MASK, SPECIAL = 96, 60, 59, [0, 1, 2]
STARTS = frozenset(range(3, 20))  # tokens that begin a word; 20 .. 58 go on with one
TOKENS = Vocabulary(SIZE, frozenset(SPECIAL), MASK, STARTS)
RATIOS = (0.05, 0.2, 0.4, 0.9)


def window(index, tokens=None, ends=(31, 64, S)):
    tokens = np.random.default_rng(index % 7).integers(0, SIZE - 1, S) if tokens is None else np.asarray(tokens)
    return Sample(index, 0, 0, 0, tokens, np.array(ends))


def hidden(objective, sample, seed=5):
    """bool [S]: what it hides."""
    labelled = objective.apply(sample, seed, TOKENS)
    hidden_S = np.zeros(len(sample.tokens_S), dtype=bool)
    hidden_S[labelled.positions_N + objective.predicts] = True
    assert (labelled.labels_N == sample.tokens_S[hidden_S]).all()
    assert (labelled.inputs_S[~hidden_S] == sample.tokens_S[~hidden_S]).all()
    assert (labelled.inputs_S[hidden_S] == MASK).all()
    return hidden_S


def words(sample):
    """The words of a window as lists of positions, one position after another: the plain way to say what they are."""
    found = []
    for position, token in enumerate(sample.tokens_S.tolist()):
        after_special = position > 0 and sample.tokens_S[position - 1] in SPECIAL
        if token in STARTS or token in SPECIAL or after_special or position in (0, *sample.segment_ends_E):
            found.append([])
        found[-1].append(position)
    return [word for word in found if sample.tokens_S[word[0]] not in SPECIAL]


@pytest.mark.parametrize("kind", [MLM, MNTP])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_special_tokens_are_never_masked_and_masks_are_nested(kind, unit):
    for index in range(60):
        sample, before = window(index), None
        for ratio in RATIOS:
            now = hidden(kind(ratio, unit=unit), sample)
            assert not now[np.isin(sample.tokens_S, SPECIAL)].any()
            assert before is None or (now | before == now).all()
            before = now


@pytest.mark.parametrize("kind", [MLM, MNTP])
def test_a_word_is_masked_whole_or_not_at_all(kind):
    seen = set()
    for index in range(200):
        sample = window(index)
        hidden_S = hidden(kind(0.4, unit="word"), sample)
        for word in words(sample):
            assert len(set(hidden_S[word].tolist())) == 1
            first = word[0] in (0, 31, 64)
            seen.add((bool(hidden_S[word[0]]), first))
    assert seen == {(True, False), (False, False), (False, True), *([(True, True)] if kind is MLM else [])}


def test_words_are_masked_as_often_as_tokens():
    rows = np.array([hidden(MLM(0.3, unit="word"), window(7 * index)) for index in range(4000)])  # of the same text
    ordinary_S = ~np.isin(window(0).tokens_S, SPECIAL)
    share_S = rows.mean(axis=0)[ordinary_S]
    deviation = (0.3 * 0.7 / len(rows)) ** 0.5
    assert abs(share_S - 0.3).max() < 4.5 * deviation
    firsts = np.array([word[0] for word in words(window(0))])
    table = np.corrcoef(rows[:, firsts], rowvar=False)
    assert abs(table[~np.eye(len(firsts), dtype=bool)]).max() < 5.5 / len(rows) ** 0.5  # words are independent


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("mean", [1.0, 3.0, 10.0])
def test_every_position_is_in_a_span_with_the_same_probability(ratio, mean):
    draw, repeats = np.random.default_rng(0), 6000
    rows = np.array([in_spans(*draw.random((2, 40)), ratio, mean) for _ in range(repeats)])
    share_S = rows.mean(axis=0)
    assert abs(share_S - ratio).max() < 4.5 * (ratio * (1 - ratio) / repeats) ** 0.5


def test_lengths_of_spans_are_geometric():
    draw, lengths = np.random.default_rng(1), []
    for _ in range(3000):
        starts_S = np.ones(400)
        starts_S[7] = 0.0  # one span
        lengths.append(in_spans(starts_S, draw.random(400), 0.1, 3.0).sum())
    lengths = np.array(lengths)
    assert abs(lengths.mean() - 3) < 4 * 6**0.5 / 3000**0.5
    for longer in range(6):
        expected = (2 / 3) ** longer
        assert abs((lengths > longer).mean() - expected) < 4 * (expected * (1 - expected) / 3000) ** 0.5 + 1e-12


def test_a_span_goes_on_at_the_windows_start_and_is_not_longer_than_the_window():
    starts_S = np.ones(8)
    starts_S[6] = 0.0
    assert in_spans(starts_S, np.zeros(8), 0.1, 5.0).all()
    found = in_spans(starts_S, np.full(8, 0.5), 0.1, 5.0)  # P(length > 3) = 0.512 > 0.5 >= P(length > 4)
    assert np.flatnonzero(found).tolist() == [0, 1, 6, 7]


@given(size=st.integers(1, 200), ratio=st.floats(0.001, 0.999), mean=st.floats(1, 500), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_spans_of_any_law_are_those_that_were_drawn(size, ratio, mean, seed):
    start_S, length_S = np.random.default_rng(seed).random((2, size))
    found = in_spans(start_S, length_S, ratio, mean)
    low, high = 0.0, 1.0
    for _ in range(100):  # the probability of a start, solved anew
        middle = (low + high) / 2
        free = np.prod([1 - middle * (1 - 1 / mean) ** k for k in range(size)])
        low, high = (middle, high) if 1 - free < ratio else (low, middle)
    expected = np.zeros(size, dtype=bool)
    for start in np.flatnonzero(start_S < high):
        length = 1
        while length < size and length_S[start] < (1 - 1 / mean) ** length:
            length += 1
        expected[(start + np.arange(length)) % size] = True
    assert (found == expected).all()


def test_a_ramp_begins_and_ends_where_it_says():
    objective = MLM(Ramp(0.3, 0.05), unit="word")
    assert objective.at(1, 6) == MLM(0.3, unit="word") and objective.at(6, 6) == MLM(0.05, unit="word")
    ratios = [objective.at(step, 6).mask_ratio for step in range(1, 7)]
    assert np.diff(ratios) == pytest.approx([-0.05] * 5)
    assert objective.at(1, 1).mask_ratio == 0.3  # a phase of one step
    assert MLM(0.3).at(4, 6) == MLM(0.3)


def test_word_starts_are_asked_for():
    MLM().check(Vocabulary(SIZE, mask_id=MASK), "phases.0.objective")
    with pytest.raises(UserError, match=r"^phases.0.objective.unit: word, but this tokenizer has no word starts"):
        MLM(unit="word").check(Vocabulary(SIZE, mask_id=MASK), "phases.0.objective")
