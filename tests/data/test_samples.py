import numpy as np
import pytest

from megatron_encdec.data.config import DataConfig, RandomLength, SourceConfig
from megatron_encdec.data.samples import Samples, random_cuts
from megatron_encdec.platform.errors import UserError

S = 16


def config(*prefixes, **changes):
    return DataConfig(**{"train": [SourceConfig(str(prefix)) for prefix in prefixes],
                         "sequence_length": S, "seed": 5, **changes})


def test_windows_tile_the_source_and_an_epoch_holds_each_once(corpus):
    prefix, documents = corpus
    row = [token for document in documents for token in document]
    samples = Samples(config(prefix))
    assert samples.len_windows == len(row) // S
    epoch = [samples.sample(i) for i in range(samples.len_windows)]
    assert sorted(sample.window for sample in epoch) == list(range(len(epoch)))
    for i, sample in enumerate(epoch):
        assert (sample.index, sample.source, sample.epoch) == (i, 0, 0)
        assert sample.tokens_S.tolist() == row[sample.window * S : (sample.window + 1) * S]
    assert samples.sample(len(epoch)).epoch == 1


def test_segments_are_the_documents(corpus):
    prefix, documents = corpus
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    samples = Samples(config(prefix))
    for i in range(samples.len_windows):
        sample = samples.sample(i)
        owner_S = owner[sample.window * S : (sample.window + 1) * S]
        expected = [*(np.flatnonzero(np.diff(owner_S)) + 1), S]
        assert sample.segment_ends_E.tolist() == expected


def test_without_isolation_a_window_is_one_segment(corpus):
    samples = Samples(config(corpus[0], isolate_documents=False))
    assert all(samples.sample(i).segment_ends_E.tolist() == [S] for i in range(samples.len_windows))


def test_isolation_and_random_length_cut_together_and_move_no_window(corpus):
    law = RandomLength(2, 6)
    plain, both = Samples(config(corpus[0])), Samples(config(corpus[0], random_length=law))
    for i in range(40):
        one, other = plain.sample(i), both.sample(i)
        assert one.window == other.window and one.tokens_S.tolist() == other.tokens_S.tolist()
        assert set(other.segment_ends_E) == set(one.segment_ends_E) | set(random_cuts(5, i, S, law))
        assert (np.diff(other.segment_ends_E) > 0).all() and other.segment_ends_E[-1] == S


def test_same_sample_in_another_process_and_list_order(corpus, tmp_path, write_pair):
    other = write_pair(tmp_path / "other", [list(range(500, 700))])
    one, two = Samples(config(corpus[0], other)), Samples(config(other, corpus[0]))
    for i in (0, 3, 77, 10**12):
        assert one.sample(i).tokens_S.tolist() == two.sample(i).tokens_S.tolist()
        assert one.stores[one.sample(i).source].prefix == two.stores[two.sample(i).source].prefix


def test_validation_is_a_fixed_set_of_its_own(corpus, tmp_path, write_pair):
    held_out = write_pair(tmp_path / "held_out", [[9] * 40, [8] * 10])
    settings = config(corpus[0], validation=[SourceConfig(str(held_out))])
    samples = Samples(settings, "validation")
    assert samples.len_windows == 3
    assert {int(samples.sample(i).tokens_S[0]) for i in range(3)} == {9}
    with pytest.raises(UserError, match="data.validation: empty"):
        Samples(config(corpus[0]), "validation")


def test_refusals_name_the_source(corpus, tmp_path, write_pair, write_manifest):
    short = write_pair(tmp_path / "short", [[1] * (S - 1)])
    with pytest.raises(UserError, match=rf"data.train.1.path: .*short holds 15 tokens, less than .* {S}"):
        Samples(config(corpus[0], short))
    twin = write_pair(tmp_path / "twin", corpus[1])
    with pytest.raises(UserError, match="data.train.1.path: .*twin is the same data as source 0"):
        Samples(config(corpus[0], twin))


def brute_force_lengths(lengths, total, smallest):
    """The law of random_length in words: fill the window, cut the last, join it if too short."""
    segments = []
    while sum(segments) < total:
        segments.append(min(next(lengths), total - sum(segments)))
    if segments[-1] < smallest and len(segments) > 1:
        last = segments.pop()
        segments[-1] += last
    return segments


@pytest.mark.parametrize("law, total", [
    (RandomLength(1, 1), 5), (RandomLength(3, 9), 64), (RandomLength(5, 20), 20)])
def test_random_length_follows_its_law(law, total):
    repeats, rng = 4000, np.random.default_rng(1)
    found, expected = np.zeros((2, repeats)), np.zeros((2, repeats))
    for i in range(repeats):
        segments = np.diff([0, *random_cuts(7, i, total, law), total])
        assert segments.sum() == total and segments.min() >= law.min
        assert (segments[:-1] <= law.max).all() and segments[-1] < law.max + law.min
        lengths = iter(lambda: int(rng.integers(law.min, law.max + 1)), None)
        reference = brute_force_lengths(lengths, total, law.min)
        found[:, i], expected[:, i] = (len(segments), segments[-1]), (len(reference), reference[-1])
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.var() / repeats + theirs.var() / repeats) ** 0.5
        assert abs(ours.mean() - theirs.mean()) <= 4 * error
        assert abs(ours.std() - theirs.std()) <= 0.1 * (theirs.std() + 1e-9)


def test_first_segments_are_uniform():
    law = RandomLength(12, 43)
    first = np.array([random_cuts(7, i, 2048, law)[0] for i in range(6400)])
    counts = np.bincount(first - 12, minlength=32)
    assert len(counts) == 32
    assert ((counts - 200) ** 2 / 200).sum() < 72  # 31 degrees of freedom, p < 1e-4


def expected_lengths(law: RandomLength, total: int) -> np.ndarray:
    """Expected number of segments of each length in a window, exactly, from the law (a renewal process)."""
    ways = law.max - law.min + 1
    cut_P = np.zeros(total + 1)  # chance that a segment drawn from the law begins at each position
    cut_P[0] = 1
    for position in range(law.min, total + 1):
        cut_P[position] = cut_P[max(0, position - law.max) : position - law.min + 1].sum() / ways
    expected_L = np.zeros(total + 1)
    last_cut = total - law.min  # a later one would leave too short a rest
    for position in range(last_cut + 1):
        drawn = np.arange(law.min, min(law.max, last_cut - position) + 1)
        expected_L[drawn] += cut_P[position] / ways
        expected_L[total - position] += cut_P[position] * (ways - len(drawn)) / ways
    return expected_L


@pytest.mark.parametrize(("law", "total", "repeats"), [
    (RandomLength(12, 2048), 2048, 30_000), (RandomLength(12, 100), 512, 5_000), (RandomLength(1, 3), 7, 5_000)],
    ids=["the paper's", "short", "tiny"])
def test_segment_lengths_have_the_laws_distribution(law, total, repeats):
    expected_L = expected_lengths(law, total) * repeats
    assert expected_L @ np.arange(total + 1) == pytest.approx(total * repeats)  # no token lost, none padded
    found_L = np.zeros(total + 1)
    for i in range(repeats):
        lengths = np.diff([0, *random_cuts(7, i, total, law), total])
        np.add.at(found_L, lengths, 1)
    assert found_L[expected_L == 0].sum() == 0
    groups, sums = [], 0.0  # neighbouring lengths together, until some 50 are expected
    for length in range(total + 1):
        groups.append(int(sums // 50))
        sums += expected_L[length]
    expected_G, found_G = (np.bincount(groups, values) for values in (expected_L, found_L))
    expected_G, found_G = expected_G[expected_G > 5], found_G[expected_G > 5]
    chi_square, freedom = ((found_G - expected_G) ** 2 / expected_G).sum(), len(expected_G) - 1
    assert chi_square < freedom + 4.5 * (2 * freedom) ** 0.5 + 5
    mean, expected_mean = total * repeats / found_L.sum(), total * repeats / expected_L.sum()
    assert abs(mean / expected_mean - 1) < 0.02


def test_segments_are_cut_anew_in_each_epoch_and_hold_every_token(corpus):
    samples = Samples(config(corpus[0], isolate_documents=False, random_length=RandomLength(2, 9)))
    epochs = [{}, {}]
    for i in range(2 * samples.len_windows):
        sample = samples.sample(i)
        assert len(sample.tokens_S) == S == sample.segment_ends_E[-1]
        epochs[sample.epoch][sample.window] = (sample.tokens_S.tolist(), sample.segment_ends_E.tolist())
    assert epochs[0].keys() == epochs[1].keys()
    assert all(epochs[0][window][0] == epochs[1][window][0] for window in epochs[0])
    same = sum(epochs[0][window][1] == epochs[1][window][1] for window in epochs[0])
    assert same < len(epochs[0]) / 3


def test_epochs_are_counted_exactly(corpus, tmp_path, write_pair):
    small = write_pair(tmp_path / "small", [[7] * (5 * S)])
    samples = Samples(DataConfig([SourceConfig(str(corpus[0]), 3), SourceConfig(str(small), 1)], sequence_length=S))
    for count in (0, 1, 100, 301):
        drawn = np.bincount([samples.sample(i).source for i in range(count)], minlength=2)
        assert samples.epochs(count) == [drawn[0] / samples.windows[0], drawn[1] / 5]


def test_only_more_than_four_epochs_are_said(corpus, tmp_path, write_pair, write_manifest):
    small = write_pair(tmp_path / "small", [[7] * (5 * S)])
    write_manifest(corpus[0])
    write_manifest(small)
    samples = Samples(config(corpus[0], small))
    limit = next(count for count in range(1000) if samples.epochs(count)[1] > 4)
    assert samples.epochs(limit - 1)[1] == 4 and samples.notes(limit - 1) == []
    (note,) = samples.notes(limit + 20)
    assert note.startswith(f"data.train.1: {small} is repeated: ") and "epochs of its 5 windows" in note


def test_data_without_a_manifest_is_said(corpus):
    (note,) = Samples(config(corpus[0])).notes(1)
    assert note.startswith(f"{corpus[0]}: no manifest")
