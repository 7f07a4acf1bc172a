from collections import Counter
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_encdec.data.draws import permute
from megatron_encdec.data.order import CIRCLE, Mixture, Order, floor_sum, quantise

KEYS = st.integers(0, 2**64 - 1)


def permuted(positions, size, key):
    """`permute` of each of `positions`."""
    return np.array([permute(position, size, key) for position in positions])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 600), key=KEYS)
def test_permute_is_a_bijection(size, key):
    assert sorted(permuted(range(size), size, key)) == list(range(size))


@pytest.mark.parametrize("size", [2**14, 2**14 + 1, 19_991])
def test_permute_is_a_bijection_at_larger_sizes(size):
    assert sorted(permuted(range(size), size, 7)) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_permute_stays_inside_huge_ranges(size, key, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5, unique=True))
    images = [permute(position, size, key) for position in positions]
    assert len(set(images)) == len(positions) and 0 <= min(images) and max(images) < size


def test_permute_refuses_positions_outside():
    for position in (-1, 5):
        with pytest.raises(ValueError, match="outside"):
            permute(position, 5, 0)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 11, 16, 37])
def test_each_place_gets_each_window_equally_often_over_keys(size):
    keys = 1500
    images = np.array([permuted(range(size), size, key * 2654435769) for key in range(keys)])
    expected = keys / size
    for column in images.T:
        chi_square = ((np.bincount(column, minlength=size) - expected) ** 2 / expected).sum()
        freedom = size - 1
        assert chi_square < freedom + 5.5 * (2 * freedom) ** 0.5 + 8


def test_neighbours_are_shuffled_apart():
    size = 20_000
    image = permuted(range(size), size, 99)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 4 / size**0.5
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 4 / size**0.5
    assert (image == np.arange(size)).sum() < 10  # fixed points: Poisson(1)
    assert (np.diff(image) == 1).sum() < 10  # so are neighbours kept together
    runs = (np.diff(image) > 0).mean()
    assert abs(runs - 0.5) < 4 * (1 / 12 / size) ** 0.5
    other = permuted(range(size), size, 100)
    assert (image == other).sum() < 10


@settings(max_examples=200, deadline=None)
@given(count=st.integers(0, 60), modulus=st.integers(1, 100), step=st.integers(0, 300),
       offset=st.integers(0, 300))
def test_floor_sum_equals_brute_force(count, modulus, step, offset):
    expected = sum((step * j + offset) // modulus for j in range(count))
    assert floor_sum(count, modulus, step, offset) == expected


def test_quantised_weights_sum_exactly_and_none_is_lost():
    assert quantise([1, 1, 1]) == [1431655766, 1431655765, 1431655765]
    assert quantise([0.1] * 10 + [1e-9]).count(0) == 0 and sum(quantise([0.3, 0.7, 1e-7])) == CIRCLE
    for bad in ([1, 0], [], [1, -1], [1, 1e-12]):
        with pytest.raises(ValueError, match="weights"):
            quantise(bad)


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), seed=st.integers(0, 10**9))
def test_mixture_counts_are_exact_and_prefixes_follow_the_weights(weights, seed):
    mixture, seen, share = Mixture(weights, seed), Counter(), np.array(weights) / sum(weights)
    for i in range(1200):
        source, count = mixture.locate(i)
        assert count == seen[source]
        seen[source] += 1
        for k, expected in enumerate(share * (i + 1)):
            assert abs(seen[k] - expected) < 2 + 0.5 * log2(i + 1)


def test_mixture_far_into_a_run():
    mixture, start = Mixture([3, 1, 1], 5), 10**13
    counts = [mixture.count(start, source) for source in range(3)]
    assert sum(counts) == start and abs(counts[0] - 0.6 * start) < 0.001 * start
    for i in range(start, start + 300):
        source, count = mixture.locate(i)
        assert count == counts[source]
        counts[source] += 1


def test_every_window_exactly_once_an_epoch_of_each_source():
    windows, order = [7, 20, 1], Order([7, 20, 1], [1, 2, 0.5], seed=3, fingerprints=["x", "y", "z"])
    seen = [Counter(), Counter(), Counter()]
    for i in range(400):
        source, epoch, window = order.locate(i)
        seen[source][epoch, window] += 1
    for source, counter in enumerate(seen):
        last = max(epoch for epoch, _ in counter)
        assert last >= 3
        for epoch in range(last):
            assert [counter[epoch, window] for window in range(windows[source])] == [1] * windows[source]
        assert max(counter.values()) == 1


@settings(max_examples=40, deadline=None)
@given(windows=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 10**9), data=st.data())
def test_an_epoch_holds_each_window_once_whatever_the_sources(windows, seed, data):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(windows), max_size=len(windows)))
    order = Order(windows, weights, seed)
    seen = [[] for _ in windows]
    for i in range(300):
        source, epoch, window = order.locate(i)
        assert epoch == len(seen[source]) // windows[source]
        seen[source].append(window)
    assert order.read(300) == [len(found) for found in seen]
    for found, size in zip(seen, windows, strict=True):
        for start in range(0, len(found), size):
            epoch = found[start : start + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))


def even(one_K: np.ndarray, one_size: int, other_K: np.ndarray, other_size: int, bins: int = 16) -> bool:
    """Whether pairs of numbers below the sizes fill bins x bins cells evenly (chi-square, p > 1e-5 or so)."""
    cells = np.bincount(one_K * bins // one_size * bins + other_K * bins // other_size, minlength=bins**2)
    expected, freedom = len(one_K) / bins**2, bins**2 - 1
    return ((cells - expected) ** 2 / expected).sum() < freedom + 4.3 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", [48_828_125, 65_536, 70_001], ids=["100 billion tokens", "2**16", "70001"])
def test_shuffling_is_as_good_as_chance(size):
    """Of a stretch of an epoch: where it comes from, what stands side by side or a batch apart, the next epoch."""
    stretch = np.arange(60_000)
    first, second = (permuted(stretch.tolist(), size, key) for key in (11, 12))
    assert even(stretch, 60_000, first, size)  # each part of the corpus everywhere
    for lag in (1, 2, 64, 1024):
        assert even(first[:-lag], size, first[lag:], size), lag
    assert even(first, size, second, size)
    for bits in range(4):  # neither do low bits survive (windows of one document lie side by side)
        assert abs(np.corrcoef(stretch >> bits & 1, first >> bits & 1)[0, 1]) < 4.5 / 60_000**0.5


def test_a_source_comes_at_even_spaces():
    """Three gap lengths at most (the three-gap theorem), near the inverse of the share: no batch without a source."""
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    mixture = Mixture(weights, 8)
    sources = np.array([mixture.locate(i)[0] for i in range(20_000)])
    for k, share in enumerate(weights):
        gaps = np.diff(np.flatnonzero(sources == k))
        assert len(set(gaps.tolist())) <= 3
        assert gaps.max() <= 3 / share and abs(gaps.mean() * share - 1) < 0.01
    batches = sources.reshape(-1, 100)
    for k, share in enumerate(weights):
        assert np.abs((batches == k).sum(1) - 100 * share).max() <= 3


def test_epochs_seeds_and_sources_have_shuffles_of_their_own():
    def epoch_order(epoch, **changes):
        order = Order([50], [1], **{"seed": 3, "fingerprints": ["x"], **changes})
        return [order.locate(i)[2] for i in range(50 * epoch, 50 * epoch + 50)]

    assert epoch_order(0) == epoch_order(0)
    others = [epoch_order(1), epoch_order(0, seed=4), epoch_order(0, fingerprints=["y"])]
    assert all(sum(a == b for a, b in zip(epoch_order(0), other, strict=True)) < 10 for other in others)


def test_order_knows_a_source_by_its_data_not_by_its_place():
    one = Order([10, 30, 20], [1, 2, 3], 9, ["a", "b", "c"])
    other = Order([20, 10, 30], [3, 1, 2], 9, ["c", "a", "b"])
    names = [["a", "b", "c"], ["c", "a", "b"]]
    for i in range(200):
        (source, *rest), (source_2, *rest_2) = one.locate(i), other.locate(i)
        assert (names[0][source], rest) == (names[1][source_2], rest_2)


def test_order_has_no_state():
    order = Order([10, 30], [1, 2], 9)
    forwards = [order.locate(i) for i in range(100)]
    assert [order.locate(i) for i in reversed(range(100))] == forwards[::-1]


def test_known_order_so_that_old_runs_stay_reproducible():
    order = Order([1000, 500], [0.7, 0.3], 1234, ["a", "b"])
    expected = [(0, 0, 147), (1, 0, 30), (0, 0, 765), (0, 700, 188)]
    assert [order.locate(i) for i in (0, 1, 2, 10**6)] == expected


@pytest.mark.parametrize("arguments", [([1], [1, 1], 0), ([0], [1], 0), ([1, 1], [1, 1], 0, ["a", "a"])])
def test_order_refuses_inconsistent_sources(arguments):
    with pytest.raises(ValueError):
        Order(*arguments)
    with pytest.raises(ValueError, match="numbered from 0"):
        Order([1], [1], 0).locate(-1)
