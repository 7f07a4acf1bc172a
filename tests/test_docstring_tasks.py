"""tools/docstring_tasks.py: sets that `finetune` reads, of documents that pretraining never saw, each in one split."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from finetune_sets import write_rows

from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.finetune.examples import load_examples
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.encode import is_validation

FAMILIES = {"library": "SC", "identifiers": "TC", "parameter_type": "QA", "summary_body": "IR"}
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[1] / "tools/docstring_tasks.py"
    spec = importlib.util.spec_from_file_location("docstring_tasks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus(tmp_path):
    """(corpus, manifest) of which 20 % were held out."""
    rows = [{"text": f"Do the thing of number {number}.\n\nParameters\n----------\nsize{number} : int\n"
                     f"    Of `thing{number}`.\nname{number} : str\n    More about it, and so much that it is a body.",
             "source": f"lib{number % 9}/a.py:f{number}", "library": f"lib{number % 9}"} for number in range(900)]
    (tmp_path / "x.manifest.json").write_text(json.dumps({"settings": {"validation_percent": 20.0}}))
    return write_rows(tmp_path / "corpus.jsonl", rows), tmp_path / "x.manifest.json"


def number_of(example) -> int:
    """The document that an example was made of."""
    text = getattr(example, "text", None) or getattr(example, "context", None) or getattr(example, "query", None) \
        or " ".join(example.words)
    return int(text.partition("number ")[2].partition(".")[0])


def test_held_out_documents_alone(tool, corpus, tmp_path):
    counts = tool.write_tasks(*corpus, tmp_path / "tasks")
    texts = [json.loads(line)["text"] for line in corpus[0].read_text().splitlines()]
    for task, family in FAMILIES.items():
        files = {split: str(tmp_path / f"tasks/{task}/{split}.jsonl") for split in SPLITS}
        found = load_examples(DatasetConfig(task, family, **files))
        examples = [getattr(found, split) for split in SPLITS]
        assert [len(one) for one in examples] == counts[task]
        numbers = [{number_of(one) for one in split} for split in examples]
        assert all(numbers) and sum(map(len, numbers)) == len(set.union(*numbers))  # no document in two splits
        for number in set.union(*numbers):
            assert is_validation(hashlib.sha256(texts[number].encode()).digest(), 20.0)


def test_sentences_for_short_windows(tool, corpus, tmp_path):
    """Cut between words, where nothing more fits; one that keeps no identifier is left out."""
    tool.write_tasks(*corpus, tmp_path / "tasks", most_bytes=90)
    whole, cut = (list(tool.identifiers(tool.held_out(*corpus), most)) for most in (None, 90))
    assert all(len(" " + " ".join(row["tokens"])) <= 90 for _, row in cut)
    assert 0 < len(cut) <= len(whole) and max(len(row["tokens"]) for _, row in whole) > max(
        len(row["tokens"]) for _, row in cut)


def test_what_each_task_asks(tool):
    text = ("Call numpy on `x.y`.\n\nsize : int\n    The size.\nname : str\n    Its name, and a lot more about it, so "
            "that it is long enough.")
    document = tool.Document("train", text, "numpy")
    assert list(tool.library([document])) == [
        ("train", {"text": text.replace("numpy", "_"), "label": "numpy"})]
    (_, words), = tool.identifiers([document])
    assert [word for word, tag in zip(words["tokens"], words["tags"], strict=True) if tag == "B-CODE"] == ["x.y"]
    rows = [row for _, row in tool.parameter_type([document])]
    assert {row["question"]: row["answers"][0]["text"] for row in rows} == {
        "What is the type of size?": "int", "What is the type of name?": "str"}
    (_, pair), = tool.summary_body([document])
    assert pair["query"] == "Call numpy on `x.y`." and pair["positive"].startswith("size : int")


def test_mistakes_are_named(tool, corpus, tmp_path):
    corpus, manifest = corpus
    with pytest.raises(UserError, match="no.json: cannot be read as a manifest"):
        tool.write_tasks(corpus, tmp_path / "no.json", tmp_path)
    manifest.write_text(json.dumps({"settings": {"validation_percent": 0.0}}))
    with pytest.raises(UserError, match="nothing was held out of pretraining"):
        tool.write_tasks(corpus, manifest, tmp_path)
    manifest.write_text(json.dumps({"settings": {"validation_percent": 20.0}}))
    with pytest.raises(UserError, match="too few held-out documents for the task library"):
        tool.write_tasks(write_rows(tmp_path / "few.jsonl", [{"text": "x", "library": "a"}]), manifest, tmp_path)
    with pytest.raises(UserError, match="few.jsonl:1: expected text and library"):
        tool.write_tasks(write_rows(tmp_path / "few.jsonl", [{"text": "x"}]), manifest, tmp_path)
