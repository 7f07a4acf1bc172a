"""Local formats, and what is said of labelled sets that are not right: always one line with file and place."""

import json

import pytest
from finetune_sets import write_rows, write_set

from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.finetune.examples import load_examples
from megatron_encdec.platform.errors import UserError

TEXTS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(40)]


def dataset(tmp_path, family="SC", rows=TEXTS, test=None, **keys):
    train = write_rows(tmp_path / "train.jsonl", rows)
    return DatasetConfig("set", family, str(train), test=str(test or train), **keys)


def test_validation_is_five_per_cent_of_train(tmp_path):
    examples = load_examples(dataset(tmp_path))
    assert (len(examples.train), len(examples.validation), len(examples.test)) == (38, 2, 40)
    assert examples.labels == ("a", "b")
    assert load_examples(dataset(tmp_path)).validation == examples.validation
    assert len(load_examples(dataset(tmp_path, max_train=5, max_eval=7)).test) == 7


def test_the_same_rows_from_every_format(tmp_path):
    import pyarrow
    import pyarrow.parquet

    expected = load_examples(dataset(tmp_path))
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in TEXTS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TEXTS), tmp_path / "rows.parquet")
    for suffix in ("csv", "parquet"):
        path = str(tmp_path / f"rows.{suffix}")
        found = load_examples(DatasetConfig("set", "SC", path, test=path))
        assert [one[1:] for one in found.train] == [one[1:] for one in expected.train]


def test_columns_of_conll(tmp_path):
    path = tmp_path / "train.conll"
    path.write_text("-DOCSTART- O\n\nPeter NNP B-PER\nleft VBD O\n\nOslo NNP B-LOC\n\n\nhe PRP O\n")
    examples = load_examples(DatasetConfig("set", "TC", str(path), str(path), str(path)))
    assert [(one.words, one.tags) for one in examples.train] == [
        (["Peter", "left"], ["B-PER", "O"]), (["Oslo"], ["B-LOC"]), (["he"], ["O"])]
    assert examples.labels == ("B-LOC", "B-PER", "O")


def test_a_folder_instead_of_the_hub(tmp_path):
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        write_rows(tmp_path / f"sst2/{split}.jsonl", TEXTS)
    examples = load_examples(DatasetConfig("sst2", "SC", "train", None, "validation", hub="nyu-mll/glue:sst2",
                                           local=str(tmp_path / "sst2")))
    assert len(examples.test) == 40
    with pytest.raises(UserError, match=r"no dev\{.parquet,.*,.tsv\} there"):
        load_examples(DatasetConfig("sst2", "SC", "train", None, "dev", hub="x", local=str(tmp_path / "sst2")))


@pytest.mark.parametrize(("row", "says"), [
    ({"text": "x"}, r"train.jsonl:41: no 'label' \(label\); columns there: text"),
    ({"text": "x", "label": None}, "train.jsonl:41: no 'label'"),
    ({"text": " ", "label": "a"}, "train.jsonl:41: 'text'"),
    ({"text": "x", "label": 0.5}, "train.jsonl:41: a label is a class, and 0.5 is a score"),
    ({"text": "x", "label": "c"}, "train.jsonl:41: label 'c' is not one of labels: a, b"),
])
def test_labels_and_texts(tmp_path, row, says):
    with pytest.raises(UserError, match=says):
        load_examples(dataset(tmp_path, rows=[*TEXTS, row], labels=("a", "b")))


@pytest.mark.parametrize(("content", "says"), [
    ("", "empty, there is no example in it"), ("\n\n", "empty"), ("{", ":1: not valid JSON"),
    ("[1]", ":1: expected a JSON object")])
def test_files(tmp_path, content, says):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        load_examples(DatasetConfig("set", "SC", str(tmp_path / "x.jsonl"), test=str(tmp_path / "x.jsonl")))


def test_missing_files_and_unknown_kinds(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_examples(DatasetConfig("set", "SC", str(tmp_path / "no.jsonl"), test="x.jsonl"))
    with pytest.raises(UserError, match="cannot read this kind of file"):
        load_examples(DatasetConfig("set", "SC", str(tmp_path / "no.xml"), test="x.jsonl"))


@pytest.mark.parametrize(("answers", "says"), [
    ({"text": ["Oslo"], "answer_start": [30]}, "the answer 'Oslo' at 30 lies outside the context"),
    ({"text": ["Oslo"], "answer_start": [-1]}, "lies outside the context"),
    ({"text": ["Oslo"], "answer_start": [1]}, "the answer is 'Oslo', but the context has 'e is' at 1"),
    (["Bergen"], "'Bergen' does not stand in the context"),
    (7, "answers: expected SQuAD's")])
def test_spans(tmp_path, answers, says):
    row = {"question": "where?", "context": "he is in Oslo now", "answers": answers}
    with pytest.raises(UserError, match=says):
        load_examples(dataset(tmp_path, "QA", [row, row]))


@pytest.mark.parametrize(("row", "says"), [
    ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens, but 1 tags"),
    ({"tokens": ["a"], "tags": ["PER"]}, "tag 'PER': expected O, B-<type> or I-<type>"),
    ({"tokens": [], "tags": []}, "and not empty")])
def test_tags(tmp_path, row, says):
    with pytest.raises(UserError, match=says):
        load_examples(dataset(tmp_path, "TC", [row, row]))


def test_a_test_label_that_training_lacks(tmp_path):
    test = write_rows(tmp_path / "test.jsonl", [{"text": "x", "label": "zzz"}])
    with pytest.raises(UserError, match="test.jsonl:1: label 'zzz' is not one of the training set's labels: a, b"):
        load_examples(dataset(tmp_path, test=test))
    with pytest.raises(UserError, match="nothing to tell apart"):
        load_examples(dataset(tmp_path, rows=[{"text": "x", "label": "a"}] * 3))


@pytest.mark.parametrize("family", ["SC", "TC", "QA", "IR"])
def test_the_toy_sets_are_valid(tmp_path, family):
    examples = load_examples(DatasetConfig(**write_set(tmp_path, family)))
    assert (len(examples.train), len(examples.validation), len(examples.test)) == (96, 16, 24)


def test_embedded_tasks_use_held_out_documents_alone(tmp_path):
    """Documents are dealt out by hash: none that pretraining saw, none in two splits."""
    import hashlib

    from megatron_encdec.text.encode import is_validation

    rows = [{"text": f"Do the thing of number {number}.\n\nParameters\n----------\nsize{number} : int\n"
                     f"    Of `thing`.\nname{number} : str\n    More about it, and a lot more, so that it is a body.",
             "source": f"lib{number % 9}/a.py:f{number}", "library": f"lib{number % 9}"} for number in range(900)]
    corpus = write_rows(tmp_path / "corpus.jsonl", rows)
    manifest = tmp_path / "x.manifest.json"
    manifest.write_text(json.dumps({"settings": {"validation_percent": 20.0}}))
    for task, family in (("library", "SC"), ("identifiers", "TC"), ("parameter_type", "QA"), ("summary_body", "IR")):
        found = load_examples(DatasetConfig(task, family, docstrings=task, corpus=str(corpus),
                                            manifest=str(manifest)))
        places = [{one.where for one in getattr(found, split)} for split in ("train", "validation", "test")]
        assert places[0] and not places[0] & places[1] and not places[0] & places[2] and not places[1] & places[2]
        for where in set.union(*places):
            text = rows[int(where.rpartition(":")[2]) - 1]["text"]
            assert is_validation(hashlib.sha256(text.encode()).digest(), 20.0)
    manifest.write_text(json.dumps({"settings": {"validation_percent": 0.0}}))
    with pytest.raises(UserError, match="nothing was held out of pretraining"):
        load_examples(DatasetConfig("library", "SC", docstrings="library", corpus=str(corpus),
                                    manifest=str(manifest)))
