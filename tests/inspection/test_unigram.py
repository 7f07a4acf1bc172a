"""Unigram entropy: known distributions, mixtures by weight, and a sample spread evenly over large data."""

import math

import numpy as np
import pytest

from megatron_encdec.data.store import TokenStore
from megatron_encdec.inspection.unigram import PIECE, count_tokens, unigram_entropy
from megatron_encdec.platform.errors import IntegrityError


def test_entropy_of_known_frequencies(tmp_path, write_pair):
    store = TokenStore(write_pair(tmp_path / "a", [[5] * 2, [0, 1]]))  # 1/2, 1/4, 1/4; five ids unused
    entropy = unigram_entropy([store], [1.0], vocabulary_size=8)
    assert entropy.nats == pytest.approx(1.5 * math.log(2))
    assert (entropy.counted, entropy.tokens) == (4, 4)


def test_sources_count_by_their_weights_not_their_sizes(tmp_path, write_pair):
    large = TokenStore(write_pair(tmp_path / "large", [[1] * 100]))
    small = TokenStore(write_pair(tmp_path / "small", [[2] * 10]))
    nats = unigram_entropy([large, small], [1.0, 3.0], vocabulary_size=4).nats
    assert nats == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_a_large_source_is_sampled_evenly_to_its_end(tmp_path, write_pair):
    row = np.repeat(np.arange(4), PIECE)  # piece k holds nothing but k
    store = TokenStore(write_pair(tmp_path / "large", [row, [4] * 7]))
    assert count_tokens(store, 5).tolist() == [PIECE] * 4 + [7]
    assert count_tokens(store, 5, limit=2 * PIECE).tolist() == [PIECE, 0, PIECE, 0, 0]
    assert unigram_entropy([store], [1.0], 5, limit=2 * PIECE).counted == 2 * PIECE
    assert count_tokens(store, 5, limit=1).sum() == PIECE  # never nothing


def test_an_id_outside_the_vocabulary_is_refused(tmp_path, write_pair):
    store = TokenStore(write_pair(tmp_path / "a", [[1, 2], [7, 3]], dtype="int32"))
    with pytest.raises(IntegrityError, match=r"a\.bin: token 2 has the id 7, outside the vocabulary of 4"):
        count_tokens(store, 4)
