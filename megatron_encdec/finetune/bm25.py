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


def best_by_bm25(queries: Sequence[str], documents: Sequence[str], count: int) -> list[list[int]]:
    """Numbers of the `count` best documents of each query, best first, ties by number."""
    bm25s = require("bm25s", "BM25 (a baseline, and mined_negatives)")
    vocabulary: dict[str, int] = {}
    rows = [[vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)] for text in documents]
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index((rows, vocabulary), show_progress=False)
    ranked = []
    for query in queries:
        known = [vocabulary[word] for word in words_of(query) if word in vocabulary]
        scores_D = index.get_scores_from_ids(known) if known else np.zeros(len(documents))
        ranked.append(np.argsort(-scores_D, kind="stable")[:count].tolist())
    return ranked
