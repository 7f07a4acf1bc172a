"""Scores of the four families, 0 to 1 (correlations: from -1), with a value for each example.

    of classes        accuracy; f1 of one of two classes; macro_f1; mcc (Matthews' correlation), by scikit-learn
    of sets           micro_f1, macro_f1, accuracy (the whole set is right), by scikit-learn
    of numbers        pearson, spearman, and pearson_spearman, the mean of both (GLUE, STS-B), by SciPy
    entity F1         seqeval (strict CoNLL spans over B-/I- tags)
    answer F1         SQuAD's official rules, as transformers has them: lower case, no punctuation, no articles, bag of
                      words; best over answers
    NDCG@10           binary relevance, 1 / log2(rank + 1), as trec_eval computes it

Each returns {"score", "scores_i"}; `scores_i` is 1 for an example that is all right, where the score is no mean over
examples. Numbers have none: they return both correlations as `pearson` and `spearman`.
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron_encdec.platform.optional import require

RANKS = 10


def _mean(values: Sequence[float]) -> dict:
    return {"score": float(np.mean(values)), "scores_i": [float(value) for value in values]}


def of_classes(metric: str, predicted: Sequence[str], gold: Sequence[str], positive: str | None = None) -> dict:
    """accuracy, f1 of the class `positive`, macro_f1 (over classes that occur) or mcc (0 where one class is given)."""
    right = _mean([one == other for one, other in zip(predicted, gold, strict=True)])
    if metric == "accuracy":
        return right
    sklearn = require("sklearn.metrics", metric)
    if metric == "mcc":
        return {**right, "score": float(sklearn.matthews_corrcoef(gold, predicted))}
    kind = {"pos_label": positive} if metric == "f1" else {"average": "macro"}
    return {**right, "score": float(sklearn.f1_score(gold, predicted, zero_division=0, **kind))}


def of_sets(metric: str, predicted: Sequence[tuple[str, ...]], gold: Sequence[tuple[str, ...]],
            labels: Sequence[str]) -> dict:
    """micro_f1, macro_f1 (over all `labels`) or accuracy of sets of labels."""
    right = _mean([set(one) == set(other) for one, other in zip(predicted, gold, strict=True)])
    if metric == "accuracy":
        return right
    sklearn = require("sklearn.metrics", metric)
    marks = [[[label in one for label in labels] for one in side] for side in (gold, predicted)]
    score = sklearn.f1_score(*map(np.array, marks), average=metric.removesuffix("_f1"), zero_division=0)
    return {**right, "score": float(score)}


def of_numbers(metric: str, predicted: Sequence[float], gold: Sequence[float]) -> dict:
    """pearson, spearman, or their mean; 0 where all predictions are the same."""
    stats = require("scipy.stats", metric)
    found = dict.fromkeys(("pearson", "spearman"), 0.0)
    if np.ptp(predicted) > 0:
        found = {"pearson": float(stats.pearsonr(predicted, gold).statistic),
                 "spearman": float(stats.spearmanr(predicted, gold).statistic)}
    return {"score": found.get(metric, sum(found.values()) / 2), **found}


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
