"""Statistics of token files: documents counted by hand, known distributions, a sample spread over large data."""

import math

import numpy as np
import pytest

from megatron_encdec.data.store import TokenStore
from megatron_encdec.inspection import data
from megatron_encdec.inspection.data import (
    PIECE,
    count_tokens,
    document_lengths,
    length_statistics,
    unigram_entropy,
)
from megatron_encdec.platform.errors import IntegrityError


def test_lengths_are_exact_across_pieces_and_empty_documents(tmp_path, write_pair, monkeypatch):
    lengths = np.random.default_rng(0).integers(0, 9, size=300)
    store = TokenStore(write_pair(tmp_path / "a", [[1] * length for length in lengths]))
    monkeypatch.setattr(data, "ENDS_PIECE", 7)  # documents lie across pieces, and end where pieces end
    found, documents = document_lengths(store)
    expected, counts = np.unique(lengths[lengths > 0], return_counts=True)
    assert found.tolist() == expected.tolist() and documents.tolist() == counts.tolist()


def test_statistics_of_lengths():
    found = length_statistics(np.array([1, 10, 100]), np.array([50, 49, 1]))
    assert found == {"mean": (50 + 490 + 100) / 100, "min": 1, "p5": 1, "p25": 1, "p50": 1, "p75": 10,
                     "p95": 10, "max": 100}
    assert length_statistics(np.array([]), np.array([])) == {}


def test_entropy_of_known_frequencies(tmp_path, write_pair):
    store = TokenStore(write_pair(tmp_path / "a", [[5] * 2, [0, 1]]))  # 1/2, 1/4, 1/4; five ids unused
    entropy = unigram_entropy([store], [1.0], vocabulary_size=8)
    assert entropy == {"nats": pytest.approx(1.5 * math.log(2)), "counted": 4, "tokens": 4}


def test_sources_count_by_their_weights_not_their_sizes(tmp_path, write_pair):
    large = TokenStore(write_pair(tmp_path / "large", [[1] * 100]))
    small = TokenStore(write_pair(tmp_path / "small", [[2] * 10]))
    nats = unigram_entropy([large, small], [1.0, 3.0], vocabulary_size=4)["nats"]
    assert nats == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_a_large_source_is_sampled_evenly_to_its_end(tmp_path, write_pair):
    row = np.repeat(np.arange(4), PIECE)  # piece k holds nothing but k
    store = TokenStore(write_pair(tmp_path / "large", [row, [4] * 7]))
    assert count_tokens(store, 5).tolist() == [PIECE] * 4 + [7]
    assert count_tokens(store, 5, limit=2 * PIECE).tolist() == [PIECE, 0, PIECE, 0, 0]
    assert unigram_entropy([store], [1.0], 5, limit=2 * PIECE)["counted"] == 2 * PIECE
    assert count_tokens(store, 5, limit=1).sum() == PIECE  # never nothing


def test_an_id_outside_the_vocabulary_is_refused(tmp_path, write_pair):
    store = TokenStore(write_pair(tmp_path / "a", [[1, 2], [7, 3]], dtype="int32"))
    with pytest.raises(IntegrityError, match=r"a\.bin: token 2 has the id 7, outside the vocabulary of 4"):
        count_tokens(store, 4)
