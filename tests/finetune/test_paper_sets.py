"""examples/finetune_paper.yaml on folders with the features that its sets have on the hub, as their cards and loading
scripts say: names, nesting, kinds of labels. Only the download itself is untried."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from finetune_sets import WORDS, run_one, write_model

from megatron_encdec.finetune.config import FinetuneConfig
from megatron_encdec.finetune.examples import load_examples
from megatron_encdec.platform.schema import build, load_yaml

CONFIG = Path(__file__).parents[2] / "examples/finetune_paper.yaml"
TEXT, INT = Value("string"), Value("int32")
CITY = ["alpha", "beta", "Oslo", "stone"]
CONTEXT = " ".join([*WORDS[:5], "Oslo", *WORDS[5:]])
ANSWER = {"text": ["Oslo"], "answer_start": [CONTEXT.index("Oslo")]}


def glue(*texts, classes):
    """Rows of GLUE; its test splits have -1 for each label."""
    features = Features({**dict.fromkeys(texts, TEXT), "label": ClassLabel(names=classes), "idx": INT})
    rows = [{**dict.fromkeys(texts, f"{WORDS[i % 12]} {WORDS[i % 7]}"), "label": i % len(classes), "idx": i}
            for i in range(40)]
    return features, {"train": rows, "test": rows[:9] + [{**rows[9], "label": -1}]}


def tagged(tags, names, **more):
    """Rows of named entities; `names` None: numbers without names."""
    city = 7 if names is None else names.index("B-LOC")
    features = Features({"tokens": Sequence(TEXT), tags: Sequence(INT if names is None else ClassLabel(names=names)),
                         **{name: kind for name, (kind, _) in more.items()}})
    rows = [{"tokens": CITY, tags: [0, 0, city, 0], **{name: value for name, (_, value) in more.items()}}] * 20
    return features, dict.fromkeys(("train", "validation", "test"), rows)


def squad(unanswered):
    features = Features({"id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT,
                         "answers": Sequence({"text": TEXT, "answer_start": INT})})
    row = {"id": "1", "title": "a", "context": CONTEXT, "question": "which city?", "answers": ANSWER}
    rows = [row] * 20 + [{**row, "answers": {"text": [], "answer_start": []}}] * unanswered
    return features, dict.fromkeys(("train", "test"), rows)


def record():
    """Answers as they stand in the passage, more than one, each a text alone."""
    features = Features({"passage": TEXT, "query": TEXT, "entities": Sequence(TEXT),
                         "entity_spans": Sequence({"text": TEXT, "start": INT, "end": INT}), "answers": Sequence(TEXT),
                         "idx": {"passage": INT, "query": INT}})
    row = {"passage": CONTEXT, "query": "the city of @placeholder", "entities": ["Oslo"], "answers": ["Oslo"],
           "entity_spans": {"text": ["Oslo"], "start": [0], "end": [4]}, "idx": {"passage": 0, "query": 1}}
    return features, dict.fromkeys(("train", "test"), [row] * 20)


def pairs(negative=False):
    names = ["query", "positive", *["negative"] * negative]
    return [{name: f"{name} {WORDS[i % 12]} {i}" for name in names} for i in range(40)]


CORPUS = [{"document": f"further {word}"} for word in WORDS]
LONG = [{"docid": TEXT, "text": TEXT}]
MLDR = [{"query_id": str(i), "query": f"query {i}", "positive_passages": [{"docid": str(i), "text": f"long text {i}"}],
         "negative_passages": []} for i in range(10)]
CONLL = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
SETS = {
    "sst2": glue("sentence", classes=["negative", "positive"]),
    "qqp": glue("question1", "question2", classes=["not_duplicate", "duplicate"]),
    "mnli": glue("premise", "hypothesis", classes=["entailment", "neutral", "contradiction"]),
    "conll2003": tagged("ner_tags", CONLL, id=(TEXT, "0"), pos_tags=(Sequence(INT), [1] * 4),
                        chunk_tags=(Sequence(INT), [1] * 4)),
    "ontonotes": tagged("tags", None),
    "uner": tagged("ner_tags", CONLL[:7], idx=(TEXT, "0"), text=(TEXT, " ".join(CITY)),
                   annotator=(Sequence(TEXT), ["a"] * 4)),
    "squad": squad(0), "squad_v2": squad(10), "record": record(),
    "msmarco": (None, {"train": pairs(), "test": pairs(), "documents": CORPUS}),
    "nq": (None, {"train": pairs(), "test": pairs(), "documents": CORPUS}),
    "mldr": (Features({"query_id": TEXT, "query": TEXT, "positive_passages": LONG, "negative_passages": LONG}),
             {"test": MLDR}),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config, its sets in folders of their own, its model a tiny one."""
    root = tmp_path_factory.mktemp("paper")
    data = load_yaml(CONFIG)
    data |= {"results": str(root / "results"), "models": [{"path": str(write_model(root / "tiny", positions=128))}],
             "grid": {"learning_rates": [1e-3], "seeds": [0]},
             "training": {"batch_size": 8, "max_steps": 1, "max_length": 64}}
    for dataset in data["datasets"]:
        features, splits = SETS[dataset["name"]]
        (root / dataset["name"]).mkdir()
        for split, rows in splits.items():
            Dataset.from_list(rows, features=features).to_parquet(
                root / dataset["name"] / f"{dataset.get(split, split)}.parquet")
        if dataset["name"] == "mldr":
            Dataset.from_list(pairs(negative=True)).to_parquet(root / "mldr/train.parquet")
            Dataset.from_list([{"docid": "a", "text": f"further {word}"} for word in WORDS]).to_parquet(
                root / "mldr/corpus.parquet")
        dataset["local"] = str(root / dataset["name"])
    return build(FinetuneConfig, data)


def test_every_set_is_read_as_it_is_on_the_hub(config):
    assert {dataset.name for dataset in config.datasets} == SETS.keys() and len(SETS) == 12
    for dataset in config.datasets:
        found = load_examples(dataset)
        assert found.train and found.validation and found.test, dataset.name
        if dataset.name == "sst2":
            assert found.labels == ("negative", "positive") and found.unlabelled == {"test": 1}
        elif dataset.family == "TC":
            tag = found.test[0].tags[2]
            assert tag == ("B-GPE" if dataset.name == "ontonotes" else "B-LOC") and "O" in found.labels
        elif dataset.family == "QA":
            assert found.test[0].answers == [("Oslo", CONTEXT.index("Oslo"))]
        elif dataset.name == "mldr":
            assert found.test[0].positives == ["long text 0"] and len(found.corpus(found.test)) == 10 + 12
            assert found.train[0].negatives
        elif dataset.family == "IR":
            assert len(found.documents) == 12


@pytest.mark.nemo
@pytest.mark.slow
def test_all_twelve_run(config):
    for run in config.runs():
        run_one(run)
        results = json.loads((run.directory / "results.json").read_text())
        assert 0 <= results["test"]["score"] <= 1, run.dataset.name
    assert len(config.runs()) == 12
