"""What a fine-tuned model's directory says: its card, its longest text, its pretraining run; and ONNX."""

import json
import shutil

import pytest
from finetune_sets import record_of, run_of, run_one

from megatron_encdec.platform.errors import UserError

pytestmark = pytest.mark.nemo


def test_the_card_names_set_seed_rate_scores_and_the_pretraining_run(root):
    from transformers import AutoTokenizer

    shutil.copytree(root / "euro", root / "exported")
    origin = {"step": 120, "history_hash": "a" * 64, "run": {"tokens": 9}}
    (root / "exported/export.json").write_text(json.dumps(origin))
    run = run_of(root, "SC", "card", model="exported", steps=1, save_model=True)
    results = run_one(run)
    directory = run.directory / "model"
    said = json.loads((directory / "finetune.json").read_text())
    assert said["scores"] == {split: results[split]["score"] for split in ("validation", "test")}
    assert (said["dataset"], said["seed"], said["learning_rate"], said["metric"]) == ("toy", 0, 3e-3, "accuracy")
    assert said["pretraining"] == origin
    card = (directory / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    assert "| learning rate | 0.003 |" in card and "| pretrained for | 120 steps |" in card
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.model_max_length == 48 and len(tokenizer("river " * 99, truncation=True)["input_ids"]) == 48


def test_the_card_of_a_retriever_has_its_prompts(root):
    run = run_of(root, "IR", "card", steps=1, save_model=True)
    run_one(run)
    card = (run.directory / "model/README.md").read_text()
    assert "library_name: sentence-transformers" in card and "| prompt of a query | `Query: ` |" in card
    assert json.loads((run.directory / "model/finetune.json").read_text())["pretraining"] is None


@pytest.mark.slow  # torch's exporter takes some ten seconds
@pytest.mark.parametrize("family", ["SC", "TC", "IR"])
def test_onnx_gives_the_same_numbers(root, family):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = run_of(root, family, "onnx", steps=2, save_model=True, onnx=True)
    run_one(run)
    assert 0 <= record_of(run)["onnx_difference"] <= 1e-4
    session = onnxruntime.InferenceSession(str(run.directory / "model/onnx/model.onnx"))
    assert [one.name for one in session.get_outputs()] == ["last_hidden_state" if family == "IR" else "logits"]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["last", "cls"])
def test_onnx_of_a_bert_that_pools_otherwise(root, pooling):
    import torch
    from transformers import BertConfig, BertModel

    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=2,
                         num_attention_heads=2)).save_pretrained(root / "bert")
    for file in (root / "euro").glob("token*"):
        shutil.copyfile(file, root / "bert" / file.name)
    run = run_of(root, "SC", "onnx_bert", "bert", steps=1, settings={"pooling": pooling}, save_model=True, onnx=True)
    run_one(run)
    assert 0 <= record_of(run)["onnx_difference"] <= 1e-4


def test_onnx_wants_a_saved_model(root):
    with pytest.raises((UserError, ValueError), match="onnx: goes with save_model"):
        run_of(root, "SC", onnx=True)
