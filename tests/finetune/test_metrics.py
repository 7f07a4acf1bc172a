"""Metrics on recorded cases, and against the reference implementations."""

import random

import pytest

from megatron_encdec.finetune import metrics
from megatron_encdec.finetune.compat import TESTED, check_version
from megatron_encdec.platform.errors import UserError


def test_accuracy():
    assert metrics.accuracy(["a", "b", "b"], ["a", "b", "c"]) == {"score": pytest.approx(2 / 3), "scores_i": [1, 1, 0]}


@pytest.mark.parametrize(("predicted", "gold", "expected"), [  # by SQuAD's evaluate-v2.0.py
    ("the Eiffel Tower", ["Eiffel Tower!"], 1.0),
    ("Denver Broncos", ["The Broncos", "Denver Broncos of Colorado"], 2 * 1 * 0.5 / 1.5),
    ("a cat sat", ["cat"], 2 / 3),
    ("", [], 1.0), ("something", [], 0.0), ("", ["something"], 0.0),
    ("the", [], 1.0), ("x", ["the"], 0.0), ("big big dog", ["big dog"], 0.8)])
def test_answer_f1(predicted, gold, expected):
    assert metrics.answer_f1([predicted], [gold])["score"] == pytest.approx(expected)


def test_ndcg_on_recorded_cases():
    assert metrics.ndcg([[3, 1, 2]], [{1}])["score"] == pytest.approx(0.6309297535714575)
    assert metrics.ndcg([[1, 3, 2]], [{1, 2}])["score"] == pytest.approx(1.5 / 1.6309297535714575)
    assert metrics.ndcg([list(range(20))], [{10}])["score"] == 0.0


@pytest.mark.nemo  # the reference is in that environment
def test_ndcg_against_trec_eval():
    import pytrec_eval

    draw = random.Random(1)
    for _ in range(50):
        ranked = draw.sample(range(30), 30)
        relevant = set(draw.sample(range(30), draw.randrange(1, 15)))
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {str(one): 1 for one in relevant}}, {"ndcg_cut.10"})
        expected = evaluator.evaluate({"q": {str(one): float(100 - rank) for rank, one in enumerate(ranked)}})
        assert metrics.ndcg([ranked], [relevant])["score"] == pytest.approx(expected["q"]["ndcg_cut_10"])


@pytest.mark.nemo  # brings seqeval
def test_entity_f1():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]]
    found = metrics.entity_f1(predicted, gold)
    assert found["score"] == pytest.approx(2 / 3) and found["scores_i"] == [0.0, 1.0]
    assert metrics.entity_f1([["O"]], [["O"]])["scores_i"] == [1.0]


def test_a_version_of_nemo_that_was_never_tried_is_refused():
    check_version(TESTED)
    with pytest.raises(UserError, match=r"nemo-automodel 0.8.0 was never tested here \(tested: 0.7.0\)"):
        check_version("0.8.0")
