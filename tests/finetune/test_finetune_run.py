"""Whole runs through NeMo's recipes on tiny encoders: learning, records, resuming, saved models.

They need the environment of NeMo (`ENCDEC_ENV=nemo bash tests/run.sh -m "nemo and not slow" tests/finetune`).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from finetune_sets import record_of, run_of, run_one

from megatron_encdec.platform.errors import UserError

pytestmark = pytest.mark.nemo


@pytest.fixture(scope="module")
def learned(root):
    """{family: (its run of 60 steps with the model saved, results, steps reported)}, each made when first asked for."""
    class Learned(dict):
        def __missing__(self, family):
            run, steps = run_of(root, family, steps=60, save_model=True, retrieval_micro_batch_size=8), []
            self[family] = run, run_one(run, lambda step, total: steps.append((step, total))), steps
            return self[family]

    return Learned()


@pytest.mark.parametrize(("family", "at_least"), [("SC", 0.9), ("TC", 0.9), ("QA", 0.6), ("IR", 0.65)])
def test_each_family_learns(root, learned, family, at_least):
    run, results, steps = learned[family]
    assert steps == [*((step, 60) for step in range(1, 61)), (60, 60)]  # the last one before the results are written
    assert results["test"]["score"] >= at_least and len(results["test"]["scores_i"]) == 24
    assert json.loads((run.directory / "results.json").read_text()) == results
    record = record_of(run)
    assert record["versions"]["nemo-automodel"] == "0.7.0" and record["steps"] == 60
    baselines = json.loads((root / f"results/baselines/{family}/toy.json").read_text())["baselines"]
    assert all(0 <= one["test"]["score"] <= 1 for one in baselines.values())


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("family", ("SC", "IR"))
def test_resume_is_never_stopped(root, family):
    through, stopped = (run_of(root, family, name, steps=6, checkpoint_every=4, shared=family == "IR")
                        for name in ("straight", "stopped"))
    straight = run_one(through)

    def stop(step, total):
        if step == 5:
            raise _Stop

    with pytest.raises(_Stop):
        run_one(stopped, stop)
    assert not (stopped.directory / "results.json").exists()
    first = []
    assert run_one(stopped, lambda step, total: first.append(step)) == straight
    assert record_of(through).get("masked_negatives") == record_of(stopped).get("masked_negatives")
    assert first[0] == 5  # from the checkpoint after step 4


def stock_score(run, auto):
    """The test scores of the saved model, loaded by a class of transformers: one text at a time."""
    import torch

    from megatron_encdec.finetune.features import load_task

    model, task, outputs = auto.from_pretrained(run.directory / "model").eval(), load_task(run), []
    for feature in task.features("test"):
        batch = task.collate([feature])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if run.family == "QA":
            outputs.append(logits.masked_fill(~batch["allowed"].unsqueeze(-1), -torch.inf)[0].numpy())
        else:
            outputs.append(logits.argmax(-1)[0].numpy())
    return task.score("test", outputs)


@pytest.mark.parametrize("family", ["SC", "TC", "QA"])
def test_saved_models_load_as_stock_classes(learned, family):
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    run, results, _ = learned[family]
    auto = AutoModelForSequenceClassification if family == "SC" else AutoModelForTokenClassification
    assert stock_score(run, auto) == results["test"]
    config = auto.from_pretrained(run.directory / "model").config
    assert config.id2label == {"SC": {0: "no", 1: "yes"}, "TC": {0: "B-CITY", 1: "O"}, "QA": {0: "start", 1: "end"}}[
        family]
    assert AutoTokenizer.from_pretrained(run.directory / "model")("alpha")["input_ids"]


def test_a_saved_retriever_is_one_for_sentence_transformers(learned):
    import sentence_transformers

    from megatron_encdec.finetune.metrics import ndcg

    run, results, _ = learned["IR"]
    loaded = sentence_transformers.SentenceTransformer(str(run.directory / "model"), device="cpu")
    rows = [json.loads(line) for line in Path(run.dataset.test).read_text().splitlines()]
    queries = loaded.encode([row["query"] for row in rows], prompt_name="query", normalize_embeddings=True)
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    vectors = loaded.encode(documents, prompt_name="document", normalize_embeddings=True)
    ranks = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    score = ndcg(ranks.tolist(), [{documents.index(row["positive"])} for row in rows])["score"]
    assert score == pytest.approx(results["test"]["score"], abs=1e-6)


def test_a_long_text_is_cut_and_a_long_sentence_refused(root):
    with pytest.raises(UserError, match="training.max_length: 999 tokens, but .* has 64 positions"):
        run_one(run_of(root, "SC", max_length=999))
    with pytest.raises(UserError, match="tokens, more than the 4 that the model takes"):
        run_one(run_of(root, "TC", max_length=4))
    cut = run_of(root, "SC", "cut", steps=1, max_length=4)
    assert run_one(cut) and record_of(cut)["cut_texts"] > 0
