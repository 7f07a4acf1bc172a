"""Local formats, and what is said of labelled sets that are not right: always one line with file and place."""


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
    examples = load_examples(DatasetConfig("sst2", "SC", "train", "validation", hub="nyu-mll/glue:sst2",
                                           local=str(tmp_path / "sst2")))
    assert len(examples.test) == 40
    with pytest.raises(UserError, match=r"no dev\{.parquet,.*,.tsv\} there"):
        load_examples(DatasetConfig("sst2", "SC", "train", "dev", hub="x", local=str(tmp_path / "sst2")))


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


def test_a_folder_with_a_split_in_two_formats(tmp_path):
    write_rows(tmp_path / "train.jsonl", TEXTS)
    (tmp_path / "train.tsv").write_text("text\tlabel\nx\t1\n")
    with pytest.raises(UserError, match="both train.jsonl and train.tsv are there"):
        load_examples(DatasetConfig("set", "SC", "train", test="train", local=str(tmp_path)))


def test_missing_files_and_unknown_kinds(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_examples(DatasetConfig("set", "SC", str(tmp_path / "no.jsonl"), test="x.jsonl"))
    with pytest.raises(UserError, match="cannot read this kind of file"):
        load_examples(DatasetConfig("set", "SC", str(tmp_path / "no.xml"), test="x.jsonl"))


@pytest.mark.parametrize(("answers", "says"), [
    ({"text": ["Oslo"], "answer_start": [30]}, "the answer 'Oslo' at 30 lies outside the context"),
    ({"text": ["Oslo"], "answer_start": [-1]}, "lies outside the context"),
    ({"text": ["Oslo"], "answer_start": [1]}, "the answer is 'Oslo', but the context has 'e is' at 1; it first"),
    ({"text": ["Oslo"]}, "'Oslo' has no answer_start .there is text.; to take each text"),
    ({"text": ["Oslo"], "answer_starts": [9]}, "'Oslo' has no answer_start .there are text, answer_starts"),
    ({"text": ["Oslo", "he"], "answer_start": [9]}, "2 texts, but 1 answer_start"),
    ({"text": ["Oslo"], "answer_start": [9, 0]}, "1 text, but 2 answer_start"),
    ({"text": ["Oslo"], "answer_start": []}, "1 text, but 0 answer_start"),
    ({"text": ["Oslo"], "answer_start": [9.5]}, "answer_start is a number of characters, found 9.5"),
    ({"text": ["Oslo"], "answer_start": 9}, "1 text, but 9, no list, answer_start"),
    ({"answer_start": [9]}, "no text there, only answer_start; a question without an answer has an empty list"),
    ({}, "no text there, only nothing"),
    ([{"text": "Oslo"}], "'Oslo' has no answer_start"),
    ({"text": [""], "answer_start": [-1]}, "an answer is a text, found ''"),
    ([["Oslo", 9, 1]], "answers: expected SQuAD's"),
    ("{'text': ['Oslo'], 'answer_start': [9]}", "is not JSON .*write it with json.dumps"),
    ({"text": ["caf\u00e9", "nu"], "answer_start": [17, 23]}, "answer_start 23 of 'nu' counts bytes"),
    (["Bergen"], "'Bergen' does not stand in the context"),
    (7, "answers: expected SQuAD's")])
def test_spans(tmp_path, answers, says):
    row = {"question": "where?", "context": "he is in Oslo at caf\u00e9 nu", "answers": answers}
    with pytest.raises(UserError, match=says):
        load_examples(dataset(tmp_path, "QA", [row, row]))


@pytest.mark.parametrize(("keys", "found"), [
    ({"answers": {"text": ["Oslo", "he"], "answer_start": [9, 0]}}, [("Oslo", 9), ("he", 0)]),
    ({"answers": {"text": "Oslo", "answer_start": 9.0}}, [("Oslo", 9)]),
    ({"answers": [{"text": "Oslo", "start": 9}, ["he", 0]]}, [("Oslo", 9), ("he", 0)]),
    ({"answers": ["Oslo"]}, [("Oslo", 9)]),
    ({"answers": "Oslo"}, [("Oslo", 9)]),
    ({"answers": '{"text": ["Oslo"], "answer_start": [9]}'}, [("Oslo", 9)]),
    ({"answers": "1995"}, [("1995", 17)]),
    ({"answers": []}, []), ({"answers": {"text": [], "answer_start": []}}, []),
    ({"answers": [], "is_impossible": True}, []), ({"answers": None, "is_impossible": True}, []),
    ({"answers": ["Oslo"], "is_impossible": False}, [("Oslo", 9)])])
def test_the_forms_of_answers(tmp_path, keys, found):
    row = {"question": "where?", "context": "he is in Oslo in 1995", **keys}
    assert load_examples(dataset(tmp_path, "QA", [row, row])).train[0].answers == found


@pytest.mark.parametrize(("keys", "says"), [
    ({"answers": ["Oslo"], "is_impossible": True}, "is_impossible is True, but answers has some"),
    ({"answers": [], "is_impossible": False}, "is_impossible is False, but answers is empty"),
    ({"answers": None, "is_impossible": False}, "train.jsonl:1: answers: expected SQuAD's"),
    ({"answers": [], "is_impossible": "maybe"}, "is_impossible: expected true or false, found 'maybe'"),
    ({}, "train.jsonl:1: no 'answers'")])
def test_no_answer_is_declared(tmp_path, keys, says):
    row = {"question": "where?", "context": "he is in Oslo", **keys}
    with pytest.raises(UserError, match=says):
        load_examples(dataset(tmp_path, "QA", [row, row]))


@pytest.mark.parametrize(("values", "labels"), [
    ([10, 2, 0, 1], ("0", "1", "2", "10")),
    ([-1, 1.0, 10], ("-1", "1", "10")),
    (["10", "2", "b"], ("10", "2", "b")),
    ([True, False], ("false", "true")),
    (["1.0", 0.0, "2.0"], ("0", "1", "2"))])
def test_names_and_order_of_classes(tmp_path, values, labels):
    rows = [{"text": f"text {number}", "label": value} for number, value in enumerate(values * 5)]
    assert load_examples(dataset(tmp_path, rows=rows)).labels == labels


def test_classes_of_a_file_of_pandas(tmp_path):
    import pandas

    table = pandas.DataFrame({"text": ["a", "b", "c", "d"], "label": [1, None, 0, 1]})  # floats, for one is missing
    table.dropna().to_csv(tmp_path / "train.csv", index=False)
    table.dropna().to_parquet(tmp_path / "test.parquet")
    found = load_examples(DatasetConfig("set", "SC", str(tmp_path / "train.csv"), test=str(tmp_path / "test.parquet")))
    assert found.labels == ("0", "1") and [one.label for one in found.test] == ["1", "0", "1"]
    table.to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"test.parquet: row 2: (the label is missing|no 'label')"):
        load_examples(DatasetConfig("set", "SC", str(tmp_path / "train.csv"), test=str(tmp_path / "test.parquet")))


def test_scores_are_no_classes_unless_labels_lists_them(tmp_path):
    rows = [{"text": f"text {number}", "label": value} for number, value in enumerate([0.5, "1.5"] * 3)]
    with pytest.raises(UserError, match="0.5 is a score .of a set with problem_type: regression.*`labels`"):
        load_examples(dataset(tmp_path, rows=rows))
    assert load_examples(dataset(tmp_path, rows=rows, labels=("0.5", "1.5"))).labels == ("0.5", "1.5")
    assert load_examples(dataset(tmp_path, rows=TEXTS[:2] + [{"text": "x", "label": 7}], labels=("a", "b", 7))).labels \
        == ("a", "b", "7")


def test_the_validation_set_leaves_train_each_label(tmp_path):
    """Wherever the only example of a label stands, it stays in train; the split is else the plain draw."""
    for place in range(40):
        rows = [dict(row) for row in TEXTS]
        rows[place]["label"] = "rare"
        found = load_examples(dataset(tmp_path, rows=rows))
        assert found.labels == ("a", "b", "rare") and "rare" in [one.label for one in found.train]
        assert (len(found.train), len(found.validation)) == (38, 2)
        tags = [{"tokens": ["x"], "tags": ["B-X" if number == place else "O"]} for number in range(40)]
        found = load_examples(dataset(tmp_path, "TC", rows=tags))
        assert found.labels == ("B-X", "O") and ["B-X"] in [one.tags for one in found.train]
    two = load_examples(dataset(tmp_path, rows=[{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]))
    assert (len(two.train), len(two.validation), two.labels) == (1, 1, ("a", "b"))


def test_a_second_text_is_there_for_all_or_none(tmp_path):
    rows = [{**row, "text_pair": "more"} for row in TEXTS]
    assert load_examples(dataset(tmp_path, rows=rows)).train[0].pair == "more"
    with pytest.raises(UserError, match="train.jsonl:41: no text_pair, which other rows of the set have"):
        load_examples(dataset(tmp_path, rows=[*rows, TEXTS[0]]))


def test_rows_that_the_hub_marks_as_unlabelled_are_counted(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    for split, labels in (("train", [0, 1, -1, 1]), ("test", [0, -1]), ("hidden", [-1, -1])):
        rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
        Dataset.from_list(rows, features).to_parquet(str(tmp_path / f"{split}.parquet"))
    keys = dict(name="set", family="SC", train="train", validation="train", local=str(tmp_path))
    found = load_examples(DatasetConfig(test="test", **keys))
    assert found.unlabelled == {"train": 1, "validation": 1, "test": 1} and [one.label for one in found.test] == ["no"]
    with pytest.raises(UserError, match="hidden: none of its 2 rows has a label"):
        load_examples(DatasetConfig(test="hidden", **keys))


@pytest.mark.parametrize(("row", "says"), [
    ({"tokens": [None], "tags": ["O"]}, "token 1 is None, expected a text"),
    ({"tokens": ["a"], "tags": ["B-"]}, "token 1, 'a': tag 'B-'"),
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
