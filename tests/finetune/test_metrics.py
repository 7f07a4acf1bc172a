"""Metrics on recorded cases, and against the reference implementations."""

import random

import pytest

from megatron_encdec.finetune import metrics
from megatron_encdec.finetune.compat import TESTED, check_version
from megatron_encdec.platform.errors import UserError


def test_accuracy():
    found = metrics.of_classes("accuracy", ["a", "b", "b"], ["a", "b", "c"])
    assert found == {"score": pytest.approx(2 / 3), "scores_i": [1, 1, 0]}


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


def test_metrics_of_classes_and_sets():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = random.Random(2)
    for names in (["0", "1"], ["a", "b", "c"]):
        gold, predicted = ([draw.choice(names) for _ in range(50)] for _ in range(2))
        right = [one == other for one, other in zip(gold, predicted, strict=True)]
        for metric, expected in (("accuracy", sum(right) / 50), ("mcc", sklearn.matthews_corrcoef(gold, predicted)),
                                 ("macro_f1", sklearn.f1_score(gold, predicted, average="macro"))):
            found = metrics.of_classes(metric, predicted, gold)
            assert found == {"score": pytest.approx(expected), "scores_i": right}
    gold, predicted = ["1", "1", "0", "0", "1"], ["1", "0", "1", "0", "1"]
    assert metrics.of_classes("f1", predicted, gold, "1")["score"] == pytest.approx(2 / 3)
    assert metrics.of_classes("f1", predicted, gold, "0")["score"] == pytest.approx(1 / 2)
    assert metrics.of_classes("mcc", ["1"] * 5, gold)["score"] == 0.0
    gold, predicted = [("a",), ("a", "c"), ("b",), ()], [("a",), ("b",), (), ()]
    found = metrics.of_sets("micro_f1", predicted, gold, ["a", "b", "c"])
    assert found == {"score": pytest.approx(2 * 1 / (2 + 4)), "scores_i": [1, 0, 0, 1]}
    assert metrics.of_sets("macro_f1", predicted, gold, ["a", "b", "c"])["score"] == pytest.approx(2 / 3 / 3)
    assert metrics.of_sets("accuracy", predicted, gold, ["a", "b", "c"])["score"] == 0.5


def test_metrics_of_numbers():
    pytest.importorskip("scipy")
    gold, predicted = [0.0, 1.0, 2.5, 5.0], [0.1, 3.0, 2.0, 9.0]
    centred = [[one - sum(side) / 4 for one in side] for side in (gold, predicted)]
    pearson = sum(a * b for a, b in zip(*centred, strict=True)) / (
        sum(a * a for a in centred[0]) * sum(b * b for b in centred[1])) ** 0.5
    found = metrics.of_numbers("pearson_spearman", predicted, gold)
    assert found["pearson"] == pytest.approx(pearson) and found["spearman"] == pytest.approx(0.8)
    assert found["score"] == pytest.approx((pearson + 0.8) / 2)
    assert metrics.of_numbers("spearman", predicted, gold)["score"] == pytest.approx(0.8)
    assert metrics.of_numbers("pearson", [1.0] * 4, gold)["score"] == 0.0
