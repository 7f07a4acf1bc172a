"""The search against numpy's, on columns of every shape, and how many blocks it reads."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_encdec.data import store
from megatron_encdec.data.store import Column
from megatron_encdec.platform.errors import IntegrityError


class Counted(Column):
    """A column that counts its reads."""

    reads = 0

    def _bytes(self, first, count):
        self.reads += 1
        return super()._bytes(first, count)


@pytest.fixture(scope="module")
def column_of(tmp_path_factory):
    """column_of(entries) -> Counted, from a file where something else stands before and behind them."""
    path = tmp_path_factory.mktemp("columns") / "c"
    opened = []

    def write(entries) -> Counted:
        path.write_bytes(b"\xff" * 13 + np.array(entries, dtype="<i8").tobytes() + b"\xff" * 9)
        opened.append(os.open(path, os.O_RDONLY))
        return Counted(path, opened[-1], 13, len(entries))

    yield write
    for descriptor in opened:
        os.close(descriptor)


def between(entries, above, upto):
    first = int(np.searchsorted(entries, above, "right"))
    return first, [entry for entry in entries[first:] if entry <= upto]


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(st.sampled_from([0, 0, 1, 2, 1000, 10**12]), max_size=80), block=st.sampled_from([1, 2, 3, 8]),
       above=st.floats(-0.1, 1.1), span=st.floats(0, 1.2))
def test_equal_to_a_plain_search(column_of, steps, block, above, span):
    entries = np.cumsum([0, *steps]).tolist()
    most = entries[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BLOCK", block)
        made = column_of(entries)
        for low in (int(above * (most + 1)), entries[len(entries) // 2], entries[0] - 1, most):
            high = low + int(span * (most + 1))
            first, found = made.between(low, high, entries[0], most + 7)
            assert (first, found.tolist()) == between(entries, low, high)


def test_an_empty_column(column_of):
    first, found = column_of([]).between(5, 9, 0, 10)
    assert first == 0 and found.tolist() == []


@pytest.mark.parametrize(("law", "typical", "worst"), [
    (lambda draw, n: draw.lognormal(0, 1, n), 2, 3), (lambda draw, n: np.sort(draw.lognormal(0, 1, n)), 8, 14),
    (lambda draw, n: np.repeat([1.0, 1000.0], n // 2), 8, 14), (lambda draw, n: 1e6 ** np.linspace(-1, 1, n), 12, 26),
], ids=["one law", "sorted by length", "two corpora", "exponential"])
def test_few_blocks_are_read(column_of, law, typical, worst):
    draw, n = np.random.default_rng(0), 1_000_000
    ends = np.cumsum(law(draw, n))
    entries = np.concatenate([[0], np.floor(ends * (1e12 / ends[-1]))]).astype(np.int64)
    made, reads = column_of(entries), []
    for value in draw.integers(0, 10**12, 400).tolist():
        made.reads = 0
        first, found = made.between(value, value + 1000, 0, 10**12)
        assert first == np.searchsorted(entries, value, "right")
        reads.append(made.reads)
    assert np.median(reads) <= typical and max(reads) <= worst


def test_a_long_run_is_whole(column_of):
    entries = list(range(0, 300_000, 3))
    first, found = column_of(entries).between(10, 200_000, 0, 300_000)
    assert first == 4 and found.tolist() == [entry for entry in entries if 10 < entry <= 200_000]


def test_a_file_cut_short_under_the_reader_is_named(column_of):
    made = column_of(list(range(2000)))
    os.truncate(made._path, 8000)
    assert made.read(0, 3).tolist() == [0, 1, 2]
    with pytest.raises(IntegrityError, match=r"c: has become shorter since it was opened: no bytes 8,000\.\.11,213"):
        made.read(900, 500)
