"""Hard negatives of retrieval: given, mined, shared by the whole batch; BEIR folders; dropout in cached gradients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from finetune_sets import losses, record_of, run_of, run_one, write_rows

from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.finetune.examples import load_examples
from megatron_encdec.finetune.features import load_task
from megatron_encdec.platform.errors import UserError


def with_negatives(root, results, count=2, **training):
    """Each row has so many negatives: the positives of rows further on."""
    run = run_of(root, "IR", results, **training)
    rows = [json.loads(line) for line in Path(run.dataset.train).read_text().splitlines()]
    bodies = [row["positive"] for row in rows]
    path = write_rows(root / f"negatives_{count}.jsonl", [
        {**row, "negatives": [bodies[(place + step) % len(bodies)] for step in range(1, count + 1)]}
        for place, row in enumerate(rows)])
    return replace(run, dataset=replace(run.dataset, name=f"negatives_{count}", train=str(path)))


@pytest.mark.parametrize(("row", "negatives"), [
    ({"query": "a", "positive": "b", "negatives": ["c", {"text": "d"}]}, ["c", "d"]),
    ({"anchor": "a", "positive": "b", "negative": "c"}, ["c"]),
    ({"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": ["d", "e"]}, ["c", "d", "e"]),
    ({"query": "a", "positive": "b", "negatives": None}, []), ({"query": "a", "positive": ["b"]}, [])])
def test_rows_of_sentence_transformers(tmp_path, row, negatives):
    path = str(write_rows(tmp_path / "rows.jsonl", [row] * 2))
    pair = load_examples(DatasetConfig("x", "IR", path, path, path)).train[0]
    assert (pair.query, pair.positives, pair.negatives) == ("a", ["b"], negatives)
    write_rows(tmp_path / "rows.jsonl", [{**row, "negative_1": 3}])
    with pytest.raises(UserError, match="rows.jsonl:1: negative_1: expected a text or a list of them, found 3"):
        load_examples(DatasetConfig("x", "IR", path, path, path))


def test_negatives_stand_after_the_documents_of_all_queries(root):
    task = load_task(with_negatives(root, "features"))
    batch = task.collate(task.train[:3])
    assert len(batch["input_ids"]) == 3 and len(batch["document_input_ids"]) == 9 == len(batch["document"])
    first = [feature["document"] for feature in task.train[:3]]
    assert batch["document"].tolist() == first + [number for one in task.train[:3] for number, _ in one["negatives"]]
    assert task.counts["hard_negatives"] == 2 * 96
    assert load_task(with_negatives(root, "features", hard_negatives=1)).counts["hard_negatives"] == 96


@pytest.mark.nemo
def test_mined_negatives_are_the_best_by_bm25_that_do_not_answer(root):
    from megatron_encdec.finetune.bm25 import best_by_bm25

    task = load_task(run_of(root, "IR", "mined", mined_negatives=3))
    train, known = task.examples.train, task.examples.answers("train")
    corpus = task.examples.corpus(train)
    best = best_by_bm25([one.query for one in train], corpus, 9)
    for answers, ranked, negatives in zip(known, best, task._negatives(train, known), strict=True):
        others = [corpus[number] for number in ranked if corpus[number] not in answers]
        assert len(negatives) == 3 and negatives == others[:3]


@pytest.mark.nemo
def test_as_many_are_mined_where_the_rows_give_the_best_already(root):
    plain = load_task(run_of(root, "IR", "mined", mined_negatives=2))
    best = plain._negatives(plain.examples.train, plain.examples.answers("train"))
    rows = [json.loads(line) for line in Path(plain.run.dataset.train).read_text().splitlines()]
    path = write_rows(root / "best.jsonl", [{**row, "negatives": own} for row, own in zip(rows, best, strict=True)])
    run = replace(plain.run, dataset=replace(plain.run.dataset, name="best", train=str(path)))
    assert load_task(run).counts["hard_negatives"] == 4 * len(rows)


def answers_that_were_not_drawn(root, tmp_path):
    """Each query has two rows with an answer each, which `documents` has too; half of the rows are drawn."""
    rows = [{"query": f"query {number // 2}", "positive": f"river stone {number}"} for number in range(80)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    documents = str(write_rows(tmp_path / "documents.jsonl", [{"document": row["positive"]} for row in rows]))
    dataset = DatasetConfig("halves", "IR", path, path, path, documents=documents, max_train=40, max_eval=40)
    return replace(run_of(root, "IR", "halves"), dataset=dataset)


def test_an_answer_that_was_not_drawn_is_no_wrong_one(root, tmp_path):
    task = load_task(answers_that_were_not_drawn(root, tmp_path))
    numbers = {text: number for number, text in enumerate(task.examples.corpus(task.examples.test))}
    other = [[number for text, number in numbers.items() if number != numbers[one.positives[0]]
              and int(text.split()[-1]) // 2 == int(one.query.split()[-1])][0] for one in task.examples.test]
    scores = task.grade("test", [[numbers[one.positives[0]], second]
                                 for one, second in zip(task.examples.test, other, strict=True)])["scores_i"]
    assert scores == [1.0] * 40
    first = task.grade("test", [[numbers[one.positives[0]]] for one in task.examples.test])["scores_i"]
    assert all(score < 1.0 for score in first)  # the second is searched, and is asked for


@pytest.mark.nemo
def test_an_answer_that_was_not_drawn_is_not_mined(root, tmp_path):
    run = answers_that_were_not_drawn(root, tmp_path)
    task = load_task(replace(run, training=replace(run.training, mined_negatives=78)))
    for one, negatives in zip(task.examples.train, task._negatives(task.examples.train, task.examples.answers("train")),
                              strict=True):
        assert len(negatives) == 78 and all(
            int(text.split()[-1]) // 2 != int(one.query.split()[-1]) for text in negatives)


def test_lists_in_columns_of_text_are_json(tmp_path):
    (tmp_path / "rows.csv").write_text('query,positive,negative_1\na,"[""b"", ""c""]","[1] d"\nx,[y,z\n')
    path = str(tmp_path / "rows.csv")
    found = load_examples(DatasetConfig("x", "IR", path, path, path)).train
    assert [(one.positives, one.negatives) for one in found] == [(["b", "c"], ["[1] d"]), (["[y"], ["z"])]
    write_rows(tmp_path / "rows.jsonl", [{"query": "a", "positive": '["b"]'}] * 2)
    path = str(tmp_path / "rows.jsonl")
    assert load_examples(DatasetConfig("x", "IR", path, path, path)).train[0].positives == ['["b"]']


@pytest.mark.nemo
def test_micro_batches_with_negatives_change_nothing(root):
    """The loss is over all documents of the batch, the negatives of other queries included, in any micro-batches."""
    import torch
    import torch.nn.functional as F

    from megatron_encdec.finetune.run import make_recipe

    runs = [with_negatives(root, f"negatives_{size}", steps=4, retrieval_micro_batch_size=size) for size in (3, 16)]
    for run in runs:
        run_one(run)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-4)
    assert record_of(runs[0])["hard_negatives"] == 192
    recipe = make_recipe(with_negatives(root, "first", steps=1))
    features = next(iter(recipe.dataloader))
    batch = recipe.task.collate(features)
    with torch.no_grad():
        queries, documents = (recipe._embed(recipe.encoder, batch[f"{one}input_ids"], batch[f"{one}attention_mask"])
                              for one in ("", "document_"))
    answers = torch.tensor([[number in one["positives"] for number in batch["document"].tolist()] for one in features])
    answers[range(16), range(16)] = False
    scores = (queries @ documents.T / 0.05).masked_fill(answers, -torch.inf)
    expected = F.cross_entropy(scores, torch.arange(16))
    assert scores.shape == (16, 48)
    assert float(recipe._backward(features, 1.0)) / 16 == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.nemo
def test_dropout_is_the_same_in_both_passes_of_cached_gradients(root, tmp_path):
    import shutil

    import torch
    from transformers import BertConfig, BertModel

    from megatron_encdec.finetune.run import make_recipe

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=2,
                         num_attention_heads=2, hidden_dropout_prob=0.3)).save_pretrained(root / "dropout")
    for file in (root / "euro").glob("token*"):
        shutil.copyfile(file, root / "dropout" / file.name)
    recipe = make_recipe(run_of(root, "IR", "dropout", model="dropout", steps=1))
    embed, seen = recipe._embed, []
    recipe._embed = lambda *words: seen.append(embed(*words)) or seen[-1]
    recipe._backward(next(iter(recipe.dataloader)), 1.0)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) > 2 and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_beir_folder_is_a_set(root, tmp_path):
    (tmp_path / "qrels").mkdir()
    write_rows(tmp_path / "corpus.jsonl", [{"_id": str(i), "title": "Oslo" if i == 1 else "", "text": f"text {i}"}
                                           for i in range(5)])
    write_rows(tmp_path / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(4)])
    for split, lines in (("train", "q0\t1\t2\nq0\t2\t1\nq1\t3\t1\n"), ("test", "q2\t4\t1\nq3\t0\t0\n")):
        (tmp_path / f"qrels/{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    dataset = DatasetConfig("beir", "IR", "train", "test", "test", beir=str(tmp_path))
    found = load_examples(dataset)
    assert [(one.query, one.positives) for one in found.train] == [
        ("query 0", ["Oslo text 1", "text 2"]), ("query 1", ["text 3"])]
    assert [one.query for one in found.test] == ["query 2"]  # the other has no answer
    assert sorted(found.corpus(found.test)) == ["Oslo text 1", *(f"text {i}" for i in (0, 2, 3, 4))]
    with pytest.raises(UserError, match="dev.tsv: no such file; splits of .*: test, train"):
        load_examples(replace(dataset, validation="dev"))
    with pytest.raises(UserError, match="no BEIR folder"):
        load_examples(replace(dataset, beir=str(tmp_path / "qrels")))
