"""Whole runs through NeMo's recipes on tiny encoders: learning, records, one rank against two, resuming, reloading.

They need the environment of NeMo (`ENCDEC_ENV=nemo bash tests/run.sh -m "nemo and not slow" tests/finetune`).
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finetune_sets import run_of, write_model, write_rows

from megatron_encdec.platform.errors import UserError

pytestmark = pytest.mark.nemo


def run_one(*arguments):
    """Imported when a test runs: where NeMo is missing, the tests are collected and skipped."""
    from megatron_encdec.finetune.run import run_one

    return run_one(*arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_model(folder / "euro")
    write_model(folder / "llama", "llama")
    return folder


@pytest.fixture(scope="module")
def learned(root):
    """{family: (its run of 60 steps with the model saved, results, steps reported)}, each made when first asked for."""
    class Learned(dict):
        def __missing__(self, family):
            run, steps = run_of(root, family, steps=60, save_model=True), []
            self[family] = run, run_one(run, lambda step, total: steps.append((step, total))), steps
            return self[family]

    return Learned()


def record_of(run) -> dict:
    return json.loads((run.directory / "record.json").read_text())


def losses(run) -> dict:
    lines = (run.directory / "checkpoints/training.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


@pytest.mark.parametrize(("family", "at_least"), [("SC", 0.9), ("TC", 0.9), ("QA", 0.6), ("IR", 0.65)])
def test_each_family_learns(root, learned, family, at_least):
    run, results, steps = learned[family]
    assert steps[-1] == (60, 60) and len(steps) == 60
    assert results["test"]["score"] >= at_least and len(results["test"]["scores_i"]) == 24
    assert json.loads((run.directory / "results.json").read_text()) == results
    record = record_of(run)
    assert record["versions"]["nemo-automodel"] == "0.7.0" and record["steps"] == 60
    baselines = json.loads((root / f"results/baselines/{family}/toy.json").read_text())["baselines"]
    assert all(0 <= one["test"]["score"] <= 1 for one in baselines.values())


def test_again_in_one_process_and_from_a_causal_export(root):
    """The same run gives the same bits; a Llama with the same weights is the same bidirectional encoder."""
    first, again, llama = (run_of(root, "SC", name, model, steps=8)
                           for name, model in (("a", "euro"), ("b", "euro"), ("c", "llama")))
    results = run_one(first)
    assert run_one(again) == results and run_one(llama) == results
    assert losses(again) == losses(first) and losses(llama) == losses(first)


def test_micro_batches_of_retrieval_change_nothing(root):
    """Cached gradients are those of the whole batch at once."""
    runs = [run_of(root, "IR", f"micro_{size}", steps=6, retrieval_micro_batch_size=size, shared=True)
            for size in (3, 16)]
    scores = [run_one(run)["validation"]["score"] for run in runs]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-4)
    assert scores[0] == pytest.approx(scores[1], abs=0.07)
    records = [record_of(run) for run in runs]
    assert records[0]["queries"] == 96 and records[0]["positives"] == records[0]["train_features"] == 192
    assert records[0]["masked_negatives"] == records[1]["masked_negatives"] > 6 * 4


def test_a_document_that_answers_the_query_is_no_negative(root):
    """Of queries that share their one document the loss is 0, not the logarithm of their number."""
    run = run_of(root, "IR", "same", steps=2, batch_size=4, retrieval_micro_batch_size=2)
    train = write_rows(root / "same.jsonl", [{"query": f"query {number}", "positive": "the answer"}
                                             for number in range(8)])
    same = replace(run, dataset=replace(run.dataset, name="same", train=str(train)))
    run_one(same)
    assert list(losses(same).values()) == [0.0, 0.0]
    record = record_of(same)
    assert (record["queries"], record["positives"], record["masked_negatives"]) == (8, 8, 2 * 4 * 3)


@pytest.mark.parametrize("family", ["IR", *(pytest.param(one, marks=pytest.mark.slow) for one in ("SC", "TC", "QA"))])
def test_two_ranks_are_one(root, family):
    """By NeMo's own application, from the YAML that a run on one rank left."""
    from megatron_encdec.finetune.run import prepare_files

    one = run_of(root, family, "one", steps=6, shared=family == "IR")
    expected = run_one(one)
    two = replace(one, results=str(root / "two"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend",
         "c10d", "--rdzv-endpoint", "localhost:0", "-m", "nemo_automodel.cli.app", str(prepare_files(two, ranks=2))],
        text=True, capture_output=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((two.directory / "results.json").read_text())
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    assert found["validation"]["score"] == pytest.approx(expected["validation"]["score"], abs=0.07)
    assert record_of(two)["ranks"] == 2
    assert record_of(one).get("masked_negatives") == record_of(two).get("masked_negatives")


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("family", ("SC", "IR"))
def test_resume_is_never_stopped(root, family):
    through, stopped = (run_of(root, family, name, steps=10, checkpoint_every=4, shared=family == "IR")
                        for name in ("straight", "stopped"))
    straight = run_one(through)

    def stop(step, total):
        if step == 7:
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
