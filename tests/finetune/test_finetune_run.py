"""Whole runs through NeMo's recipes on tiny encoders: learning, records, one rank against two, resuming, reloading."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("nemo_automodel", reason="needs megatron_encdec[nemo]")

from finetune_sets import write_model, write_rows, write_set

from megatron_encdec.finetune.config import Cell, DatasetConfig, ModelConfig, TrainingConfig
from megatron_encdec.finetune.run import run_one
from megatron_encdec.platform.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_model(folder / "euro")
    write_model(folder / "llama", "llama")
    return folder


def cell_of(root, family, results="results", model="euro", steps=30, shared=False, **training):
    """`shared` (retrieval): each query has a second positive, which all have."""
    files = write_set(root / (family + "_shared" * shared), family)
    if shared:
        rows = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()]
        write_rows(Path(files["train"]), [{**row, "positive": [row["positive"], "river stone"]} for row in rows])
    dataset = DatasetConfig(**files)
    settings = dict(batch_size=16, micro_batch_size=8, max_steps=steps, epochs=100, max_length=48)
    return Cell(ModelConfig(str(root / model)), dataset, 3e-3, 0, str(root / results),
                TrainingConfig(**{**settings, **training}))


@pytest.mark.parametrize(("family", "at_least"), [("SC", 0.9), ("TC", 0.9), ("QA", 0.6), ("IR", 0.65)])
def test_each_family_learns(root, family, at_least):
    cell, steps = cell_of(root, family, steps=60), []
    results = run_one(cell, lambda step, total: steps.append((step, total)))
    assert steps[-1] == (60, 60) and len(steps) == 60
    assert results["test"]["score"] >= at_least and len(results["test"]["scores_i"]) == 24
    assert json.loads((cell.directory / "results.json").read_text()) == results
    record = json.loads((cell.directory / "record.json").read_text())
    assert record["versions"]["nemo-automodel"] == "0.7.0" and record["steps"] == 60
    baselines = json.loads((root / f"results/baselines/{family}/toy.json").read_text())["baselines"]
    assert all(0 <= one["test"]["score"] <= 1 for one in baselines.values())


def test_again_in_one_process_and_from_a_causal_export(root):
    """The same cell gives the same bits; a Llama with the same weights is the same bidirectional encoder."""
    first = run_one(cell_of(root, "SC", "a", steps=8))
    assert run_one(cell_of(root, "SC", "b", steps=8)) == first
    assert run_one(cell_of(root, "SC", "c", model="llama", steps=8)) == first
    loss = [(root / f"{name}/{model}/SC/toy/lr0.003_sd0/checkpoints/training.jsonl").read_text()
            for name, model in (("a", "euro"), ("c", "llama"))]
    assert [json.loads(line)["loss"] for line in loss[0].splitlines()] == \
        [json.loads(line)["loss"] for line in loss[1].splitlines()]


def losses(cell):
    lines = (cell.directory / "checkpoints/training.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def test_micro_batches_of_retrieval_change_nothing(root):
    """Cached gradients are those of the whole batch at once."""
    cells = [cell_of(root, "IR", f"micro_{size}", steps=6, retrieval_micro_batch_size=size, shared=True)
             for size in (3, 16)]
    scores = [run_one(cell)["validation"]["score"] for cell in cells]
    assert losses(cells[0]) == pytest.approx(losses(cells[1]), rel=2e-4)
    assert scores[0] == pytest.approx(scores[1], abs=0.07)
    records = [json.loads((cell.directory / "record.json").read_text()) for cell in cells]
    assert records[0]["queries"] == 96 and records[0]["positives"] == records[0]["train_features"] == 192
    assert records[0]["masked_negatives"] == records[1]["masked_negatives"] > 6 * 4


def test_a_document_that_answers_the_query_is_no_negative(root):
    """Of queries that share their one document the loss is 0, not the logarithm of their number."""
    cell = cell_of(root, "IR", "same", steps=2, batch_size=4, retrieval_micro_batch_size=2)
    train = write_rows(root / "same.jsonl", [{"query": f"query {number}", "positive": "the answer"}
                                             for number in range(8)])
    same = replace(cell, dataset=replace(cell.dataset, name="same", train=str(train)))
    run_one(same)
    assert list(losses(same).values()) == [0.0, 0.0]
    record = json.loads((same.directory / "record.json").read_text())
    assert (record["queries"], record["positives"], record["masked_negatives"]) == (8, 8, 2 * 4 * 3)


def test_positives_of_one_query_in_several_rows(root):
    import numpy as np

    from megatron_encdec.finetune.features import load_task

    cell = cell_of(root, "IR", "rows")
    rows = [{"query": "a", "positive": ["one", "two"]}, {"query": "a", "positive": "three"},
            {"query": "b", "positive": ["two", "two"]}]
    train = str(write_rows(root / "rows.jsonl", rows))
    task = load_task(replace(cell, dataset=replace(cell.dataset, name="rows", train=train, test=train)))
    assert [(one["document"], one["positives"]) for one in task.train] == [
        (0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1, 2]), (1, [1])]
    batch = task.collate(task.train)
    assert batch["positives"].tolist() == [[0, 1, 2]] * 3 + [[1, -1, -1]] and len(batch["document_input_ids"]) == 4
    scores = task.score("test", [*np.eye(3)[[0, 2, 2]], *np.eye(3)])["scores_i"]
    assert scores[:2] == [1.0, 1.0] and scores[2] < 1.0  # a: all three documents answer it, whichever row asks


def test_a_question_whose_answer_no_window_holds_is_left_out_and_counted(root):
    from megatron_encdec.finetune.features import load_task

    cell = cell_of(root, "QA", "windows", max_length=8)
    context = " ".join(["river stone cloud light"] * 8)
    rows = [{"question": "which city?", "context": context, "answers": [context[:5]]},
            {"question": "which city?", "context": context, "answers": [context]},
            {"question": "which city?", "context": context, "answers": []}]
    train = str(write_rows(root / "windows.jsonl", rows))
    task = load_task(replace(cell, dataset=replace(cell.dataset, name="windows", train=train, validation=train)))
    assert {feature["example"] for feature in task.train} == {0, 2} and task.counts["answers_in_no_window"] == 1
    assert {feature["example"] for feature in task.features("validation")} == {0, 1, 2}
    alone = str(write_rows(root / "alone.jsonl", rows[1:2] * 2))
    with pytest.raises(UserError, match="no window of 8 tokens holds the answer.*training.max_length"):
        load_task(replace(cell, dataset=replace(cell.dataset, name="alone", train=alone)))


@pytest.mark.parametrize("family", ["SC", "IR", *(pytest.param(one, marks=pytest.mark.slow) for one in ("TC", "QA"))])
def test_two_ranks_are_one(root, family):
    """By NeMo's own application, from the YAML that a run on one rank left."""
    one = cell_of(root, family, "one", steps=6, shared=family == "IR")
    expected = run_one(one)
    two = replace(one, results=str(root / "two"))
    from megatron_encdec.finetune.run import prepare_files

    config = prepare_files(two, ranks=2)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend",
         "c10d", "--rdzv-endpoint", "localhost:0", "-m", "nemo_automodel.cli.app", str(config)],
        text=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((two.directory / "results.json").read_text())
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    assert found["validation"]["score"] == pytest.approx(expected["validation"]["score"], abs=0.07)
    records = [json.loads((cell.directory / "record.json").read_text()) for cell in (one, two)]
    assert records[1]["ranks"] == 2 and records[0].get("masked_negatives") == records[1].get("masked_negatives")


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("family", ("SC", "IR"))
def test_resume_is_never_stopped(root, family):
    through, stopped = (cell_of(root, family, name, steps=10, checkpoint_every=4, shared=family == "IR")
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
    counts = [json.loads((cell.directory / "record.json").read_text()).get("masked_negatives")
              for cell in (through, stopped)]
    assert counts[0] == counts[1]
    assert first[0] == 5  # from the checkpoint after step 4


def stock_score(cell, auto):
    """The test scores of the saved model, loaded by a class of transformers: one text at a time."""
    import torch

    from megatron_encdec.finetune.features import load_task

    model, task, outputs = auto.from_pretrained(cell.directory / "model").eval(), load_task(cell), []
    for feature in task.features("test"):
        batch = task.collate([feature])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if cell.family == "QA":
            outputs.append(logits.masked_fill(~batch["allowed"].unsqueeze(-1), -torch.inf)[0].numpy())
        else:
            outputs.append(logits.argmax(-1)[0].numpy())
    return task.score("test", outputs)


@pytest.mark.parametrize("family", ["SC", "TC", "QA"])
def test_saved_models_load_as_stock_classes(root, family):
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    cell = cell_of(root, family, "saved", steps=40, save_model=True)
    results = run_one(cell)
    auto = AutoModelForSequenceClassification if family == "SC" else AutoModelForTokenClassification
    assert stock_score(cell, auto) == results["test"]
    config = auto.from_pretrained(cell.directory / "model").config
    assert config.id2label == {"SC": {0: "no", 1: "yes"}, "TC": {0: "B-CITY", 1: "O"}, "QA": {0: "start", 1: "end"}}[
        family]
    assert AutoTokenizer.from_pretrained(cell.directory / "model")("alpha")["input_ids"]


def test_a_saved_retriever_is_one_for_sentence_transformers(root):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import numpy as np

    from megatron_encdec.finetune.metrics import ndcg

    retrieval = cell_of(root, "IR", "saved", steps=10, save_model=True)
    run_one(retrieval)
    loaded = sentence_transformers.SentenceTransformer(str(retrieval.directory / "model"), device="cpu")
    rows = [json.loads(line) for line in Path(retrieval.dataset.test).read_text().splitlines()]
    queries = loaded.encode([row["query"] for row in rows], prompt_name="query", normalize_embeddings=True)
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    vectors = loaded.encode(documents, prompt_name="document", normalize_embeddings=True)
    ranks = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    score = ndcg(ranks.tolist(), [{documents.index(row["positive"])} for row in rows])["score"]
    written = json.loads((retrieval.directory / "results.json").read_text())["test"]["score"]
    assert score == pytest.approx(written, abs=1e-6)


def test_a_long_text_is_cut_and_a_long_sentence_refused(root):
    with pytest.raises(UserError, match="training.max_length: 999 tokens, but .* has 64 positions"):
        run_one(cell_of(root, "SC", max_length=999))
    with pytest.raises(UserError, match="tokens, more than the 4 that the model takes"):
        run_one(cell_of(root, "TC", max_length=4))
    assert run_one(cell_of(root, "SC", "cut", steps=1, max_length=4))
    record = json.loads((root / "cut/euro/SC/toy/lr0.003_sd0/record.json").read_text())
    assert record["cut_texts"] > 0
