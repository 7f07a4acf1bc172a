"""Hard negatives mined by an encoder, reranked by a cross-encoder, within limits; kept for all runs of a tree."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetune_sets import record_of, run_of, run_one

from megatron_encdec.finetune import mining
from megatron_encdec.finetune.config import FinetuneConfig, NegativesConfig, load_config
from megatron_encdec.finetune.features import load_task
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import build

nemo = pytest.mark.nemo


@pytest.fixture(scope="module")
def cross_encoder(root):
    """A tiny one with random weights, and one that has three outputs."""
    from transformers import BertConfig, BertForSequenceClassification

    for name, outputs in (("cross", 1), ("three", 3)):
        torch.manual_seed(0)
        BertForSequenceClassification(BertConfig(
            vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            pad_token_id=2, num_labels=outputs, initializer_range=0.5)).save_pretrained(root / name)
        for file in (root / "euro").glob("token*"):
            shutil.copyfile(file, root / name / file.name)
    return str(root / "cross")


def mined_run(root, results="mined", **keys):
    run = run_of(root, "IR", results)
    return replace(run, dataset=replace(run.dataset, negatives=NegativesConfig(**keys)))


def pieces(run):
    """Its task; queries, answers and corpus; what was mined for each query."""
    task = load_task(run)
    answers = task.examples.answers("train")
    return [one.query for one in task.examples.train], answers, task.examples.corpus(task.examples.train), \
        task._negatives(task.examples.train, answers)


def cosines(root, queries, documents):
    """[queries, documents], of the encoder by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(root / "euro"), device="cpu")
    return np.asarray(model.encode(queries, normalize_embeddings=True)
                      @ model.encode(documents, normalize_embeddings=True).T)


@nemo
def test_an_encoders_best_that_do_not_answer(root):
    queries, answers, corpus, mined = pieces(mined_run(root, mined_by=str(root / "euro"), count=3, range_min=1))
    for scores, own, negatives in zip(cosines(root, queries, corpus), answers, mined, strict=True):
        others = [number for number in np.argsort(-scores) if corpus[number] not in own]
        found = [scores[corpus.index(one)] for one in negatives]
        assert len(set(negatives)) == 3 and not set(negatives) & set(own)
        assert found == pytest.approx(scores[others[1:4]], abs=1e-5)  # the first is passed over


@nemo
@pytest.mark.parametrize(("limits", "most"), [
    ({"relative_margin": 0.01}, lambda answer: answer - 0.01 * abs(answer)), ({"max_score": 0.9}, lambda answer: 0.9),
    ({"absolute_margin": 0.02}, lambda answer: answer - 0.02)])
def test_what_may_answer_after_all_is_left_out(root, limits, most):
    """The best below the limit, fewer where there are no more among the candidates."""
    queries, answers, corpus, mined = pieces(mined_run(root, mined_by=str(root / "euro"), count=2, range_max=96,
                                                       **limits))
    for scores, own, negatives in zip(cosines(root, queries, corpus), answers, mined, strict=True):
        limit = most(min(scores[corpus.index(one)] for one in own))
        expected = sorted((score for text, score in zip(corpus, scores, strict=True)
                           if text not in own and score <= limit), reverse=True)[:2]
        assert [scores[corpus.index(one)] for one in negatives] == pytest.approx(expected, abs=1e-5)


@nemo
@pytest.mark.parametrize("miner", ["bm25", "encoder"])
def test_a_cross_encoder_decides_among_the_candidates(root, cross_encoder, miner):
    from sentence_transformers import CrossEncoder

    by = {"mined_by": str(root / "euro") if miner == "encoder" else miner}
    queries, answers, corpus, mined = pieces(mined_run(root, **by, reranked_by=cross_encoder, count=2, range_max=8))
    candidates = pieces(mined_run(root, **by, count=8, range_max=8, min_score=-1.0))[3]
    model = CrossEncoder(cross_encoder, device="cpu")
    moved = 0
    for query, own, negatives, others in list(zip(queries, answers, mined, candidates, strict=True))[:20]:
        scores = np.sort(model.predict([(query, one) for one in others]))[::-1]
        found = model.predict([(query, one) for one in negatives])
        assert len(negatives) == 2 and not set(negatives) & set(own)
        assert found[0] >= found[1] and (found >= scores[:2] - 1e-5).all()  # a ninth, in the place of the answer, too
        moved += negatives != others[:2]
    assert moved > 10


@nemo
def test_bm25_within_limits_is_bm25(root):
    from megatron_encdec.finetune.bm25 import Bm25

    queries, _, corpus, limited = pieces(mined_run(root, count=2, min_score=0.01))
    plain, index = pieces(mined_run(root, count=2))[3], Bm25(corpus)
    for query, one, other in zip(queries, limited, plain, strict=True):  # the same but for ties
        scores = dict(zip(corpus, index.scores(query), strict=True))
        assert [scores[text] for text in one] == pytest.approx([scores[text] for text in other])


@nemo
def test_what_was_mined_is_kept_until_something_changes(root, tmp_path, monkeypatch, cross_encoder):
    model = shutil.copytree(root / "euro", tmp_path / "miner")
    run = mined_run(root, "kept", mined_by=str(model), count=2)
    folder = root / "kept" / mining.FOLDER
    expected = pieces(run)[3]
    assert len(list(folder.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(mining, "load_embedder", None)
        assert pieces(run)[3] == expected
        moved = shutil.copytree(model, tmp_path / "moved")
        assert pieces(mined_run(root, "kept", mined_by=str(moved), count=2))[3] == expected
    pieces(mined_run(root, "kept", mined_by=str(model), count=3))
    pieces(mined_run(root, "kept", mined_by=str(model), reranked_by=cross_encoder, count=2))
    assert len(list(folder.iterdir())) == 3
    shutil.copyfile(root / "llama/config.json", model / "config.json")
    assert pieces(run)[3] != expected and len(list(folder.iterdir())) == 4


@nemo
def test_a_run_trains_on_them(root, cross_encoder):
    run = mined_run(root, "trained", mined_by=str(root / "euro"), reranked_by=cross_encoder, count=1)
    run_one(replace(run, training=replace(run.training, max_steps=1)))
    record = record_of(run)
    assert record["hard_negatives"] == 96
    assert {"model", "train", "negatives by euro", "negatives by cross"} <= record["made_of"].keys()


@nemo
def test_what_is_no_cross_encoder_is_refused(root, cross_encoder):
    with pytest.raises(UserError, match=r"euro: no cross-encoder \(its config.json names EuroBertForMaskedLM\)"):
        load_task(mined_run(root, "refused", reranked_by=str(root / "euro")))
    with pytest.raises(UserError, match="three: a cross-encoder that orders documents has one output, this one has 3"):
        load_task(mined_run(root, "refused", reranked_by=str(root / "three")))


@nemo
def test_the_old_form_is_bm25_without_limits(root):
    old = run_of(root, "IR", "old", mined_negatives=3)
    new = mined_run(root, "new", count=3)
    assert old.negatives == new.negatives and load_task(old).train == load_task(new).train


@pytest.mark.parametrize(("keys", "says"), [
    ({"family": "SC", "negatives": {}}, "negatives: a key of retrieval"),
    ({"negatives": {"count": 0}}, "datasets.0.negatives.count: 0 is not at least 1"),
    ({"negatives": {"count": 4, "range_min": 3, "range_max": 6}}, "range_max: 6 leaves no 4 documents after the first"),
    ({"negatives": {"mined_with": "x"}}, "mined_with: unknown key")])
def test_keys_that_do_not_fit(keys, says):
    with pytest.raises(UserError, match=says):
        build(FinetuneConfig, {"model": "m", "results": "r", "datasets": [
            {"name": "x", "family": "IR", "train": "a", "test": "b", **keys}]})


def test_both_forms_or_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = {"model": str(tmp_path), "results": "r", "datasets": [
        {"name": "x", "family": "IR", "train": "a", "test": "b", "negatives": {"mined_by": "nowhere"}}]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(UserError, match="datasets.0.negatives: nowhere: no such folder; name one that holds a model"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="training.mined_negatives: a dataset has `negatives`"):
        load_config(tmp_path / "config.yaml", ["training.mined_negatives=3"])
