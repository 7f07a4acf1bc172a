"""Bad input of each family is one line that names what is there, before anything is trained."""

import json
import shutil
from dataclasses import replace

import pytest
from finetune_sets import run_of, write_rows

from megatron_encdec.finetune.features import load_task
from megatron_encdec.platform.errors import UserError

NEEDED = {"SC": "label", "TC": "tags", "QA": "context", "IR": "positive"}


def refused(run, says):
    with pytest.raises(UserError, match=says) as error:
        load_task(run)
    assert len(str(error.value).splitlines()) == 1


def on_rows(run, root, change, split="train"):
    """`run` with `change` made to each row of `split`."""
    path = root / f"{run.family}/{split}.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    changed = write_rows(root / f"{run.family}_changed_{split}.jsonl", rows)
    return replace(run, dataset=replace(run.dataset, name="changed", **{split: str(changed)}))


@pytest.mark.parametrize("family", NEEDED)
def test_a_column_that_is_missing(root, family):
    run = on_rows(run_of(root, family), root, lambda row: {("what" if key == NEEDED[family] else key): value
                                                           for key, value in row.items()})
    refused(run, f"_changed_train.jsonl:1: no '{NEEDED[family]}' .*; columns there: .*what")


@pytest.mark.parametrize(("family", "change"), [
    ("SC", lambda row: {**row, "label": "perhaps"}),
    ("TC", lambda row: {**row, "tags": ["B-RIVER", *row["tags"][1:]]})])
def test_labels_that_only_test_has(root, family, change):
    refused(on_rows(run_of(root, family), root, change, "test"),
            "_changed_test.jsonl:1: label '(perhaps|B-RIVER)' is not one of the training set's labels: .*list all")


@pytest.mark.parametrize("family", NEEDED)
def test_more_tokens_than_positions(root, family):
    refused(run_of(root, family, max_length=65), "training.max_length: 65 tokens, but .*/euro has 64 positions")


def test_a_word_with_more_tokens_than_a_sentence_may_have(root):
    run = on_rows(run_of(root, "TC"), root, lambda row: {"tokens": ["seven"] * 70, "tags": ["O"] * 69 + ["B-CITY"]})
    refused(run, "_changed_train.jsonl:1: [0-9]+ tokens, more than the 48 that the model takes; split the sentence")


@pytest.mark.parametrize("family", NEEDED)
def test_a_tokenizer_without_a_token_of_padding(root, family):
    """It is padded with the end of text, or, without one, with the first token: padding is masked."""
    for name, keys in (("end", {"pad_token"}), ("nothing", {"pad_token", "eos_token"})):
        folder = root / f"without_{name}_{family}"
        shutil.copytree(root / "euro", folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                    if key not in keys}))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        task = load_task(run_of(root, family, model=folder.name))
        assert task.pad is not None and len(task.train) > 0
        assert task.collate(sorted(task.train, key=lambda one: len(one["ids"]))[:: len(task.train) - 1]) is not None


@pytest.mark.parametrize("family", NEEDED)
def test_a_model_with_code_of_its_own(root, family):
    folder = root / f"remote_{family}"
    shutil.copytree(root / "euro", folder)
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModel": "code.Mine"}}')
    (folder / "code.py").write_text("raise SystemExit('code that came with a model was run')")
    refused(run_of(root, family, model=folder.name), "code that comes with a model is never run")
