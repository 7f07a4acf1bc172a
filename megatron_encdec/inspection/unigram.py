"""The corpus' unigram entropy: what a model that knows nothing but token frequencies would lose per token.

    1. `count_tokens(store, ...)`   occurrences of each id, streamed; an evenly spread sample of a large store
    2. `unigram_entropy(...)`       of the mixture that training draws from, in nats

Legend: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_encdec.data.store import TokenStore
from megatron_encdec.platform.errors import IntegrityError

SAMPLE_ABOVE = 200_000_000  # tokens of a source; more than that is sampled, down to about that many
PIECE = 1 << 20  # tokens read at once


@dataclass(frozen=True)
class Entropy:
    """Entropy in nats, and how many of the sources' tokens it was counted on."""

    nats: float
    counted: int
    tokens: int


def count_tokens(store: TokenStore, vocabulary_size: int, limit: int = SAMPLE_ABOVE) -> np.ndarray:
    """counts_V (int64) of at most about `limit` tokens, in pieces spread evenly over the store.

    Raises IntegrityError where an id lies outside the vocabulary.
    """
    counts_V = np.zeros(vocabulary_size, dtype=np.int64)
    pieces = -(-store.tokens // PIECE)
    kept = pieces if store.tokens <= limit else max(1, limit // PIECE)
    for piece in (number * pieces // kept for number in range(kept)):
        start = piece * PIECE
        tokens_P = store.read(start, min(PIECE, store.tokens - start))
        outside = (tokens_P < 0) | (tokens_P >= vocabulary_size)
        if outside.any():
            raise IntegrityError(f"{store.prefix}.bin: token {start + int(outside.argmax())} has the id "
                                 f"{tokens_P[outside][0]}, outside the vocabulary of {vocabulary_size}")
        counts_V += np.bincount(tokens_P, minlength=vocabulary_size)
    return counts_V


def unigram_entropy(stores: Sequence[TokenStore], weights: Sequence[float], vocabulary_size: int,
                    limit: int = SAMPLE_ABOVE) -> Entropy:
    """Entropy of one token drawn as training draws it: a source by its weight, then a token of it."""
    counted, share_V = 0, np.zeros(vocabulary_size)
    for store, weight in zip(stores, weights, strict=True):
        counts_V = count_tokens(store, vocabulary_size, limit)
        counted += int(counts_V.sum())
        share_V += weight * counts_V / max(1, counts_V.sum())
    share_V /= share_V.sum()
    present_V = share_V[share_V > 0]
    nats = float(-(present_V * np.log(present_V)).sum())
    return Entropy(nats, counted, sum(store.tokens for store in stores))
