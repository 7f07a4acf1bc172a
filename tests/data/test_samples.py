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
    other = write_pair(tmp_path / "other", [[1] * 50])
    write_manifest(corpus[0], "one")
    write_manifest(other, "two")
    with pytest.raises(UserError, match="data.train.1.path: .*other was written with another tokenizer"):
        Samples(config(corpus[0], other))
    assert Samples(config(other)).tokenizer["fingerprint"] == "two"


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
