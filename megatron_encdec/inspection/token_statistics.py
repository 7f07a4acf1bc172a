"""Statistics of token files, streamed: lengths of documents, and the unigram entropy (what a model that knows nothing
but token frequencies would lose per token, in nats).

Legend: L lengths that occur, V vocabulary, E document ends, P tokens of a piece.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_encdec.data.store import TokenStore
from megatron_encdec.platform.errors import IntegrityError

PERCENTILES = (5, 25, 50, 75, 95)
ENDS_PIECE = 1 << 24  # tokens whose document ends are looked up at once
PIECE = 1 << 20  # tokens read at once
SAMPLE_ABOVE = 200_000_000  # tokens of a source; of more than that, about that many are counted


def document_lengths(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """lengths_L ascending, documents_L of that length; empty documents are not among them."""
    found: Counter[int] = Counter()
    previous = 0  # where the document under way began
    for start in range(0, store.tokens, ENDS_PIECE):
        ends_E = start + store.document_ends(start, min(ENDS_PIECE, store.tokens - start))
        if len(ends_E):
            lengths, documents = np.unique(np.diff(ends_E, prepend=previous), return_counts=True)
            found.update(dict(zip(lengths.tolist(), documents.tolist(), strict=True)))
            previous = int(ends_E[-1])
    lengths_L = np.array(sorted(found), dtype=np.int64)
    return lengths_L, np.array([found[length] for length in lengths_L.tolist()], dtype=np.int64)


def length_statistics(lengths_L: np.ndarray, documents_L: np.ndarray) -> dict:
    """Mean, extremes and percentiles (nearest rank) in tokens; empty where there is no document."""
    if not len(lengths_L):
        return {}
    found = np.percentile(lengths_L, PERCENTILES, weights=documents_L, method="inverted_cdf")
    return {"mean": float(np.average(lengths_L, weights=documents_L)), "min": int(lengths_L[0]),
            **{f"p{percent}": int(length) for percent, length in zip(PERCENTILES, found, strict=True)},
            "max": int(lengths_L[-1])}


def count_tokens(store: TokenStore, vocabulary_size: int, limit: int = SAMPLE_ABOVE) -> np.ndarray:
    """counts_V (int64) of at most about `limit` tokens, in pieces spread evenly over the store; IntegrityError where an
    id lies outside the vocabulary."""
    counts_V = np.zeros(vocabulary_size, dtype=np.int64)
    pieces = -(-store.tokens // PIECE)
    kept = pieces if store.tokens <= limit else max(1, limit // PIECE)
    for start in (number * pieces // kept * PIECE for number in range(kept)):
        tokens_P = store.read(start, min(PIECE, store.tokens - start))
        outside = (tokens_P < 0) | (tokens_P >= vocabulary_size)
        if outside.any():
            raise IntegrityError(f"{store.prefix}.bin: token {start + int(outside.argmax())} has the id "
                                 f"{tokens_P[outside][0]}, outside the vocabulary of {vocabulary_size}")
        counts_V += np.bincount(tokens_P, minlength=vocabulary_size)
    return counts_V


def unigram_entropy(stores: Sequence[TokenStore], weights: Sequence[float], vocabulary_size: int,
                    limit: int = SAMPLE_ABOVE) -> dict:
    """`nats` of one token drawn as training draws it: a source by its weight, then a token of it.

    `tokens`: of all sources; `counted`: those that were looked at.
    """
    counted, share_V = 0, np.zeros(vocabulary_size)
    for store, weight in zip(stores, weights, strict=True):
        counts_V = count_tokens(store, vocabulary_size, limit)
        counted += int(counts_V.sum())
        share_V += weight * counts_V / max(1, counts_V.sum())
    share_V /= share_V.sum()
    present_V = share_V[share_V > 0]
    return {"nats": float(-(present_V * np.log(present_V)).sum()), "counted": counted,
            "tokens": sum(store.tokens for store in stores)}
