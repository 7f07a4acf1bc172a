"""Hard negatives of retrieval: for each query, documents that seem to answer it and do not.

    1. `mine(...)`      by BM25 or by an encoder, in the order of a cross-encoder where one is given, within limits on
                        scores; all but plain BM25 by `mine_hard_negatives` of sentence-transformers
    2. what was mined is kept for all runs of a tree: RESULTS/.negatives/<key>.npz (row_cache.py)

The key is a hash of queries, answers, documents, settings and the files of the models. Legend of shapes: Q queries, D
documents.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from megatron_encdec.finetune.bm25 import Bm25, best_by_bm25
from megatron_encdec.finetune.config import BM25, NegativesConfig
from megatron_encdec.finetune.embedders import load_cross_encoder, load_embedder
from megatron_encdec.finetune.fingerprints import revision_of
from megatron_encdec.finetune.row_cache import kept_rows
from megatron_encdec.platform.schema import to_dict

FOLDER = ".negatives"
PACKAGES = ("bm25s", "sentence-transformers", "transformers")  # that decide what is mined
_NUMBERS = "documents"
_SCORES_AT_ONCE = 2**26  # of queries and documents, in memory


def mine(answers: Mapping[str, Sequence[str]], corpus: Sequence[str], how: NegativesConfig, count: int,
         folder: Path) -> dict[str, list[str]]:
    """Of each query at most `count` documents of `corpus`, best first, none of its `answers`, of which one is in
    `corpus` at least. Kept under `folder`."""
    revisions = {model: revision_of(model) for model in how.models}
    versions = [found.version for name in PACKAGES for found in importlib.metadata.distributions(name=name)]
    settings = {**to_dict(how), "count": count, "mined_by": revisions.get(how.mined_by, how.mined_by),
                "reranked_by": revisions.get(how.reranked_by)}
    key = hashlib.sha256(orjson.dumps([settings, versions, list(answers.items()), list(corpus)])).hexdigest()
    numbers = {text: number for number, text in enumerate(corpus)}

    def made() -> dict[str, list]:
        by = _plainly if how.is_plain else _with_limits
        found = by(answers, corpus, how, count, revisions)
        return {_NUMBERS: [[numbers[text] for text in found.get(query, ())] for query in answers]}

    rows = kept_rows(folder / f"{key}.npz", {_NUMBERS: 1}, made)[_NUMBERS]
    return {query: [corpus[number] for number in row] for query, row in zip(answers, rows, strict=True)}


def _plainly(answers, corpus, _how, count: int, _revisions) -> dict[str, list[str]]:
    """The best by BM25."""
    ranked = best_by_bm25(list(answers), corpus, count + max(map(len, answers.values())))
    return {query: [corpus[number] for number in row if corpus[number] not in set(own)][:count]
            for (query, own), row in zip(answers.items(), ranked, strict=True)}


def _with_limits(answers, corpus, how: NegativesConfig, count: int, revisions) -> dict[str, list[str]]:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    there = set(corpus)
    pairs = [(query, one) for query, own in answers.items() for one in own if one in there]
    count = min(count, how.range_max - how.range_min) if how.range_max else count
    limits = {name: getattr(how, name) for name in ("max_score", "min_score", "absolute_margin", "relative_margin")}
    if how.reranked_by is not None and set(limits.values()) == {None}:
        limits["min_score"] = -1e9  # without any limit the library does not ask the cross-encoder
    found = mine_hard_negatives(
        Dataset.from_dict(dict(zip(("query", "positive"), zip(*pairs, strict=True), strict=True))),
        _Bm25Model() if how.mined_by == BM25 else load_embedder(how.mined_by, revisions[how.mined_by]),
        corpus=list(corpus), num_negatives=count, range_min=how.range_min, range_max=how.range_max, **limits,
        cross_encoder=how.reranked_by and load_cross_encoder(how.reranked_by, revisions[how.reranked_by]),
        output_format="triplet", faiss_batch_size=max(1, _SCORES_AT_ONCE // len(corpus)), verbose=False)
    negatives: dict[str, dict[str, None]] = {}
    for query, negative in zip(found["query"], found["negative"], strict=True):  # again for each of its answers
        negatives.setdefault(query, {})[negative] = None
    return {query: list(texts) for query, texts in negatives.items()}


class _Bm25Model:
    """BM25 with the methods of a `SentenceTransformer` that miners ask for: a text's embedding is its number."""

    device = torch.device("cpu")

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        """[D, 1]"""
        self._index = Bm25(texts)
        return np.arange(len(texts))[:, None]

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        """[Q, 1]"""
        self._queries = texts
        return np.arange(len(texts))[:, None]

    def similarity(self, queries_Q1: np.ndarray, documents_D1: torch.Tensor) -> torch.Tensor:
        """[Q, D] scores."""
        return torch.from_numpy(np.stack([self._index.scores(self._queries[number]) for number, in queries_Q1])
                                [:, documents_D1[:, 0].numpy()])

    def similarity_pairwise(self, queries_Q1: np.ndarray, documents_Q1: torch.Tensor) -> torch.Tensor:
        """[Q] scores."""
        return torch.tensor([float(self._index.scores(self._queries[query])[document])
                             for query, document in zip(queries_Q1[:, 0], documents_Q1[:, 0], strict=True)])
