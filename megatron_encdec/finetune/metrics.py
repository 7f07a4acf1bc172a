"""Scores of the four families, 0 to 1, with a value for each example.

    accuracy          share of equal labels
    entity F1         seqeval (strict CoNLL spans over B-/I- tags)
    answer F1         SQuAD's official rules, as transformers has them: lower case, no punctuation, no articles, bag of
                      words; best over answers
    NDCG@10           binary relevance, 1 / log2(rank + 1), as trec_eval computes it

Each returns {"score", "scores_i"}; `scores_i` of entity F1 is 1 for a sentence whose entities are all right.
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron_encdec.platform.optional import require

RANKS = 10


def _mean(values: Sequence[float]) -> dict:
    return {"score": float(np.mean(values)), "scores_i": [float(value) for value in values]}


def accuracy(predicted: Sequence[str], gold: Sequence[str]) -> dict:
    return _mean([one == other for one, other in zip(predicted, gold, strict=True)])


def entity_f1(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict:
    """Micro F1 over all sentences."""
    seqeval = require("seqeval.metrics", "entity F1")
    from seqeval.metrics.sequence_labeling import get_entities

    score = float(seqeval.f1_score([list(tags) for tags in gold], [list(tags) for tags in predicted], zero_division=0))
    exact = _mean([get_entities(list(one)) == get_entities(list(other))
                   for one, other in zip(predicted, gold, strict=True)])
    return {**exact, "score": score}


def answer_f1(predicted: Sequence[str], gold: Sequence[Sequence[str]]) -> dict:
    """Mean over questions of the best F1 over their answers; a question without answers wants an empty text."""
    from transformers.data.metrics.squad_metrics import compute_f1, normalize_answer

    return _mean([max(compute_f1(answer, one) for answer in ([a for a in answers if normalize_answer(a)] or [""]))
                  for one, answers in zip(predicted, gold, strict=True)])


def ndcg(ranked: Sequence[Sequence[int]], relevant: Sequence[set[int]]) -> dict:
    """Mean NDCG@10 over queries; `ranked` are document numbers, best first."""
    gains = [1 / math.log2(rank + 2) for rank in range(RANKS)]
    return _mean([sum(gain for gain, one in zip(gains, documents, strict=False) if one in wanted)
                  / sum(gains[: len(wanted)]) for documents, wanted in zip(ranked, relevant, strict=True)])
