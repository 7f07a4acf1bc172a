"""Data that phases change: what they share goes on where it stopped, whatever lies between."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_encdec.data.config import DataConfig, RandomLength, SourceConfig
from megatron_encdec.data.order import Order
from megatron_encdec.data.samples import Samples
from megatron_encdec.data.training_data import Declaration, TrainingData

S = 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory, write_pair, write_manifest):
    """Three sources of 40, 25 and 13 windows of 8 tokens; no token is in two of them, or twice in one."""
    root, begin = tmp_path_factory.mktemp("sources"), 0
    for name, windows in (("a", 40), ("b", 25), ("c", 13)):
        write_pair(root / name, [list(range(begin, begin + windows * S + 3))])
        write_manifest(root / name)
        begin += windows * S + 3
    return root


def data_of(root, blend: dict[str, float], **keys) -> DataConfig:
    return DataConfig([SourceConfig(str(root / name), weight) for name, weight in blend.items()],
                      **{"sequence_length": S, **keys})


def training_data(*parts: tuple[int, DataConfig], key: str | None = None) -> TrainingData:
    """Each part: how many samples, and the declaration. key: of all their sources."""
    declarations, at = [], 0
    for number, (count, config) in enumerate(parts):
        declarations.append(Declaration(at, at + count, config, f"phases.{number}.data", key))
        at += count
    return TrainingData(declarations)


BLENDS = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 3.0, 7.0]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(phases=st.lists(st.tuples(st.integers(1, 40), BLENDS), min_size=1, max_size=6))
def test_every_window_once_an_epoch_over_the_whole_run(sources, phases):
    """Blends that change, sources that come, vanish and come back: nothing is lost, nothing repeated too early."""
    data = training_data(*((count, data_of(sources, blend)) for count, blend in phases))
    total, seen = sum(count for count, _ in phases), {}
    for index in range(total):
        sample = data.sample(index)
        store = data.of(index).stores[sample.source]
        seen.setdefault(str(store.prefix), []).append((sample.epoch, sample.window))
    for prefix, found in seen.items():
        windows = {"a": 40, "b": 25, "c": 13}[prefix[-1]]
        assert [epoch for epoch, _ in found] == [number // windows for number in range(len(found))]
        assert max(Counter(found).values()) == 1
        for epoch in range(len(found) // windows):
            assert sorted(window for one, window in found if one == epoch) == list(range(windows))


def test_without_a_change_it_is_the_order_of_one_declaration(sources):
    blend = {"a": 3.0, "b": 1.0}
    one, cut = Samples(data_of(sources, blend)), training_data((30, data_of(sources, blend)), (200, data_of(
        sources, blend, isolate_documents=False)))
    for index in range(230):
        assert np.array_equal(one.sample(index).tokens_S, cut.sample(index).tokens_S)


def test_a_sample_does_not_depend_on_what_comes_later(sources):
    first = (50, data_of(sources, {"a": 1.0, "b": 1.0}))
    short, long = training_data(first), training_data(first, (30, data_of(sources, {"c": 1.0})))
    for index in range(50):
        assert np.array_equal(short.sample(index).tokens_S, long.sample(index).tokens_S)


def test_another_window_length_has_windows_of_its_own_and_says_what_repeats(sources):
    """And the first length goes on where it stopped when it comes back."""
    short, long = data_of(sources, {"a": 1.0}), data_of(sources, {"a": 1.0}, sequence_length=2 * S)
    data = training_data((10, short), (10, long), (30, short))
    assert {len(data.sample(index).tokens_S) for index in range(10, 20)} == {2 * S}
    windows = [data.sample(index).window for index in (*range(10), *range(20, 50))]
    assert sorted(windows) == list(range(40))
    (note,) = [note for note in data.notes() if "anew" in note]
    assert note.startswith("phases.1.data: windows of 16 tokens begin") and "24.8% of it" in note
    assert "about 40 of the 160 tokens" in note


def again_counted(data: TrainingData, counts: list[int]) -> list[int]:
    """Tokens that each part takes and that an earlier sample, its own included, had taken: counted one by one."""
    seen, found, at = set(), [], 0
    for count in counts:
        found.append(0)
        for index in range(at, at + count):
            sample = data.sample(index)
            begin, source = sample.window * len(sample.tokens_S), data.of(index).fingerprints[sample.source]
            taken = {(source, token) for token in range(begin, begin + len(sample.tokens_S))}
            found[-1] += len(taken & seen)
            seen |= taken
        at += count
    return found


@pytest.mark.parametrize("parts", [
    ((100, 1), (100, 2), (100, 1)), ((60, 1), (30, 2), (20, 4), (70, 2)), ((60, 2), (250, 1)), ((300, 1), (20, 2))])
def test_what_is_read_again_is_told_of_every_part(tmp_path, write_pair, write_manifest, parts):
    """Also where a length comes back, after several others, and beyond a first epoch. parts: samples, and the length of
    their windows."""
    prefix = write_pair(tmp_path / "text", [[1] * (250 * S + 3)])
    write_manifest(prefix)
    data = training_data(*((count, data_of(tmp_path, {"text": 1.0}, sequence_length=S * factor))
                           for count, factor in parts))
    notes = [note for note in data.notes() if "are read again" in note]
    assert [note.split(":")[0] for note in notes] == [f"phases.{number}.data" for number in range(1, len(parts))]
    counted = again_counted(data, [count for count, _ in parts])[1:]
    for note, again, (count, factor) in zip(notes, counted, parts[1:], strict=True):
        about, taken = re.search(r"about ([\d,]+) of the ([\d,]+) tokens", note).groups()
        assert int(taken.replace(",", "")) == count * factor * S
        assert int(about.replace(",", "")) == pytest.approx(again, abs=0.08 * count * factor * S)
    if parts[0] == (100, 1):
        assert "phases.2.data: windows of 8 tokens go on" in notes[1]


def test_epochs_are_those_of_the_text_whatever_the_length_of_its_windows(sources):
    parts = [(30, data_of(sources, {"c": 1.0}, sequence_length=S * factor)) for factor in (1, 2, 1)]
    (note,) = [note for note in training_data(*parts).notes() if "is repeated" in note]
    assert note.startswith("phases.2.data.train.0")
    assert "9.6 epochs of it, in windows of 8 and 16 tokens" in note  # 60 / 13 + 30 / 6
    (note,) = [note for note in training_data(*parts, key="data.train").notes() if "is repeated" in note]
    assert note.startswith("data.train.0: ")


def test_cuts_belong_to_their_declaration(sources):
    plain = data_of(sources, {"a": 1.0}, isolate_documents=False)
    cut = data_of(sources, {"a": 1.0}, isolate_documents=False, random_length=RandomLength(2, 4))
    data = training_data((5, plain), (5, cut))
    assert [len(data.sample(index).segment_ends_E) > 1 for index in range(10)] == [False] * 5 + [True] * 5


def test_repeated_sources_are_told_once_where_they_end(sources):
    blend = {"c": 1.0}
    notes = training_data((30, data_of(sources, blend)), (50, data_of(sources, {"c": 1.0, "a": 0.001})),
                          (20, data_of(sources, blend))).notes()
    (note,) = [note for note in notes if "is repeated" in note]
    assert note.startswith("phases.2.data.train.0") and "7.7 epochs" in note


def test_order_goes_on_in_closed_form():
    """Far out it costs no more than at the start, and agrees with counting one by one."""
    before = Order([1000, 700], [3, 1], 5)
    switch = 10_000
    after = Order([1000, 700], [1, 2], 5, first=switch, read=before.read(switch))
    counts = before.read(switch)
    for index in range(switch, switch + 500):
        source, epoch, _ = after.locate(index)
        assert epoch == counts[source] // (1000, 700)[source]
        counts[source] += 1
    assert counts == after.read(switch + 500)
    far = Order([1000, 700], [1, 2], 5, first=10**12, read=before.read(10**12))
    assert far.locate(10**12 + 7)[1] > 10**8
