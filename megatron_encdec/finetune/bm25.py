"""BM25 by bm25s, as Lucene has it (Robertson and Zaragoza 2009): a baseline of retrieval, and a miner of negatives."""

import re
from collections.abc import Sequence

import numpy as np

from megatron_encdec.platform.optional import require

K1, B = 1.2, 0.75
WORD = r"\w+"


def words_of(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and underscores."""
    return re.findall(WORD, text.lower())


class Bm25:
    """An index of `documents`."""

    def __init__(self, documents: Sequence[str]):
        bm25s = require("bm25s", "BM25 (a baseline, and mined negatives)")
        self._vocabulary: dict[str, int] = {}
        rows = [[self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words_of(text)]
                for text in documents]
        self._count, self._index = len(rows), bm25s.BM25(method="lucene", k1=K1, b=B)
        self._index.index((rows, self._vocabulary), show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """A score of each document."""
        known = [self._vocabulary[word] for word in words_of(query) if word in self._vocabulary]
        return self._index.get_scores_from_ids(known) if known else np.zeros(self._count, np.float32)


def best_by_bm25(queries: Sequence[str], documents: Sequence[str], count: int) -> list[list[int]]:
    """Numbers of the `count` best documents of each query, best first, ties by number."""
    index = Bm25(documents)
    return [np.argsort(-index.scores(query), kind="stable")[:count].tolist() for query in queries]
