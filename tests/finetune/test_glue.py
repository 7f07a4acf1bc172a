"""Tasks as GLUE has them: pairs, numbers, sets of labels, a metric for each set, a few shots."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finetune_sets import SPLITS, WORDS, losses, record_of, run_of, run_one, write_rows

from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.finetune.examples import load_examples
from megatron_encdec.finetune.features import load_task
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import build

TOPICS = {"good": "praise", "bad": "blame", "Paris": "place"}


def row(problem: str, draw: random.Random) -> dict:
    words = [draw.choice(WORDS) for _ in range(5)]
    if problem == "regression":  # how much of the first text is in the second, from 0 to 5
        kept = draw.randrange(6)
        return {"text": " ".join(words), "text_pair": " ".join(words[:kept] + ["Oslo"] * (5 - kept)), "label": kept / 1}
    if problem == "multi_label_classification":
        found = [word for word in TOPICS if draw.random() < 0.4]
        return {"text": " ".join(words + found), "label": [TOPICS[word] for word in found]}
    same = draw.random() < 0.6
    return {"text": " ".join(words), "text_pair": " ".join(words if same else words[:2] + ["Lima", "Cairo"]),
            "label": "equivalent" if same else "not_equivalent"}


def glue_run(root, problem="single_label_classification", results="glue", steps=60, **keys):
    """A run on a set of pairs (classes or numbers) or of sets of labels; `keys` of the dataset."""
    folder = root / problem
    if not folder.exists():
        folder.mkdir()
        draw = random.Random(problem)
        for split, size in zip(SPLITS, (160, 24, 40), strict=True):
            write_rows(folder / f"{split}.jsonl", [row(problem, draw) for _ in range(size)])
    files = {split: str(folder / f"{split}.jsonl") for split in SPLITS}
    run = run_of(root, "SC", results, steps=steps)
    return replace(run, dataset=DatasetConfig(keys.pop("name", problem), "SC", **files, problem_type=problem, **keys))


@pytest.mark.nemo
def test_numbers_are_learnt_and_saved_as_regression(root):
    """STS-B's kind: pairs with a score; Pearson and Spearman of the outputs by SciPy."""
    from scipy.stats import pearsonr, spearmanr
    from transformers import AutoModelForSequenceClassification

    from megatron_encdec.finetune.run import make_recipe

    run = glue_run(root, "regression")
    run = replace(run, training=replace(run.training, save_model=True, max_steps=100))
    recipe = make_recipe(run)
    recipe.run_train_validation_loop()
    predicted = [float(one) for one in recipe.outputs("test")]
    gold = [json.loads(line)["label"] for line in Path(run.dataset.test).read_text().splitlines()]
    found = recipe.results["test"]
    assert found == {"score": pytest.approx((found["pearson"] + found["spearman"]) / 2),
                     "pearson": pytest.approx(pearsonr(gold, predicted).statistic, abs=1e-6),
                     "spearman": pytest.approx(spearmanr(gold, predicted).statistic, abs=1e-6)}
    assert found["score"] > 0.4 and record_of(run)["metric"] == "pearson_spearman"
    config = AutoModelForSequenceClassification.from_pretrained(run.directory / "model").config
    assert config.problem_type == "regression" and config.num_labels == 1
    baselines = json.loads((root / "glue/baselines/SC/regression.json").read_text())["baselines"]
    assert baselines["mean"]["test"]["score"] == 0.0 < baselines["tfidf_cosine"]["test"]["score"]


@pytest.mark.nemo
def test_the_loss_of_numbers_and_sets_is_that_of_transformers(root):
    """The first loss, by the stock class's own loss on the same batch: squared error, BCE over texts and classes."""
    import torch

    from megatron_encdec.finetune.run import make_recipe

    for problem in ("regression", "multi_label_classification"):
        run = replace(glue_run(root, problem, "loss", steps=1), seed=3)
        recipe = make_recipe(run)
        features = next(iter(recipe.dataloader))
        batch = recipe.task.collate(features)
        with torch.no_grad():
            expected = recipe.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                      labels=batch["labels"]).loss
        assert float(recipe._backward(features, 1.0)) / recipe._targets(features) == pytest.approx(float(expected))


@pytest.mark.nemo
def test_sets_of_labels_are_learnt(root):
    results = run_one(glue_run(root, "multi_label_classification", metric="macro_f1"))
    assert results["test"]["score"] > 0.6 and len(results["test"]["scores_i"]) == 40
    baselines = json.loads((root / "glue/baselines/SC/multi_label_classification.json").read_text())["baselines"]
    assert baselines["naive_bayes"]["test"]["score"] > baselines["majority"]["test"]["score"]


@pytest.mark.nemo
@pytest.mark.parametrize("keys", [{"metric": "f1", "positive_label": "equivalent"}, {"metric": "mcc"}])
def test_each_set_has_its_metric(root, keys):
    """MRPC's F1 is about the paraphrases; CoLA's is Matthews' correlation."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    task = load_task(glue_run(root, **keys))
    outputs = np.random.default_rng(0).integers(0, 2, 40)
    gold = np.array([example.label == "not_equivalent" for example in task.examples.test]).astype(int)
    expected = f1_score(1 - gold, 1 - outputs) if "positive_label" in keys else matthews_corrcoef(gold, outputs)
    assert task.score("test", list(outputs))["score"] == pytest.approx(expected)


def test_shots_are_so_many_of_each_class_and_each_seeds_own(root):
    run = glue_run(root, shots=4)
    of_seed = []
    for seed in (0, 1, 0):
        train = load_examples(run.dataset, seed).train
        assert [example.label for example in train].count("equivalent") == 4 == len(train) / 2
        of_seed.append([example.text for example in train])
    assert of_seed[0] == of_seed[2] != of_seed[1]
    assert len(load_task(replace(run, seed=1)).train) == 8
    assert [one["ids"] for one in load_task(run).train] != [one["ids"] for one in load_task(replace(run, seed=1)).train]
    assert len(load_examples(glue_run(root, "regression", shots=7).dataset).train) == 7
    with pytest.raises(UserError, match="shots: 100, but there are .* examples for training of class .*lower shots"):
        load_examples(replace(run.dataset, shots=100))


def test_labels_of_the_wrong_kind_are_refused(root, tmp_path):
    def load(label, problem, **keys):
        rows = [{"text": "river", "label": label}] * 3
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        return load_examples(DatasetConfig("rows", "SC", path, path, path, problem_type=problem, **keys))

    with pytest.raises(UserError, match=r"rows.jsonl:1: regression has a number for each text, found 'good'"):
        load("good", "regression")
    with pytest.raises(UserError, match="rows.jsonl: all its numbers are -1, so nothing can correlate with them"):
        load(-1.0, "regression")
    rows = [{"text": "river", "label": float(number > 1)} for number in range(6)]
    path = str(write_rows(tmp_path / "few.jsonl", rows))
    with pytest.raises(UserError, match="validation, a part of .*few.jsonl: all its numbers are .*take more of it"):
        load_examples(DatasetConfig("few", "SC", path, path, problem_type="regression"))
    with pytest.raises(UserError, match=r"rows.jsonl:1: labels of a text are a list, found 'good'|are a list \(in CSV"):
        load("good", "multi_label_classification")
    with pytest.raises(UserError, match="2.5 is a score .*problem_type: regression"):
        load(2.5, "single_label_classification")
    with pytest.raises(UserError, match="metric f1 is about one of two classes; here are .*as `positive_label`"):
        load_task(glue_run(root, metric="f1"))


@pytest.mark.parametrize(("keys", "says"), [
    ({"metric": "pearson"}, "metric: 'pearson' is none of single_label_classification: accuracy, f1, macro_f1, mcc"),
    ({"problem_type": "regression", "labels": ["a", "b"]}, "labels: regression has numbers"),
    ({"positive_label": "a"}, "positive_label: only metric f1"), ({"shots": 0}, "shots"),
    ({"family": "TC", "metric": "f1"}, "metric: a key of SC"),
])
def test_keys_that_do_not_fit(keys, says):
    with pytest.raises(UserError, match=says):
        build(DatasetConfig, {"name": "x", "family": "SC", "train": "a", "test": "b", **keys})


@pytest.mark.nemo
def test_no_class_weighs_more_than_another(root):
    """The first loss of an uneven set is the plain mean over its texts."""
    import torch.nn.functional as F

    from megatron_encdec.finetune.run import make_recipe

    run = glue_run(root, results="weights", steps=1)
    recipe = make_recipe(run)
    features = next(iter(recipe.dataloader))
    batch = recipe.task.collate(features)
    logits = recipe.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    recipe.run_train_validation_loop()
    assert losses(run)[0] == pytest.approx(float(F.cross_entropy(logits, batch["labels"])), rel=1e-5)
