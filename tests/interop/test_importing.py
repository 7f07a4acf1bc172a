"""The verb, and training on from what it made."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from check_parity import compare
from random_models import SIZES, save
from small_run import metrics, run_cli

from megatron_encdec.cli import main
from megatron_encdec.engine.checkpoint import read_run_state
from megatron_encdec.interop.source import find, whole_trunk


@pytest.fixture(scope="module")
def decoder(prepared, tmp_path_factory):
    """A random Qwen2 with the tokenizer of the data, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("decoder") / "hf"
    save("qwen2", directory, prepared / "tokenizer")
    return directory


def config_of(prepared, tmp_path, **sections):
    config = yaml.safe_load((prepared / "config.yaml").read_text())
    config |= {"run": {"dir": str(tmp_path / "mlm"), "from": {"path": str(tmp_path / "run"), "state": "weights"}},
               "model": {"run": str(tmp_path / "run")},
               "tokenizer": {"path": str(tmp_path / "run" / "tokenizer")},
               "phases": [{"name": "mlm", "objective": "mlm", "steps": 4}], "optimizer": {"lr": 1e-3},
               "schedule": {"name": "wsd", "warmup_steps": 2, "decay_steps": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, **sections}))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_continued_pretraining_from_an_import(prepared, decoder, tmp_path, capsys, dtype):
    """Import, an MLM phase with a fresh optimizer and its own warm-up, export, and back in again."""
    assert main(["import", str(decoder), str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "the tokenizer's own" in out and "Qwen2ForCausalLM, 116,112 parameters in float32" in out
    assert main(["inspect", "checkpoint", str(tmp_path / "run")]) == 0
    for more in ([], ["--sample", "0"]):
        assert main(["inspect", "run", str(tmp_path / "run"), *more]) == 2
        assert f"{tmp_path}/run: imported (Qwen2ForCausalLM), and nothing is trained in it" in capsys.readouterr().err
    config = config_of(prepared, tmp_path)
    assert main(["pretrain", str(config), f"precision.dtype={dtype}", "data.sequence_length=32"]) == 0
    steps = metrics(tmp_path / "mlm")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[0]["lr"] == 5e-4  # half of the warm-up's two steps
    state = read_run_state(tmp_path / "mlm" / "checkpoints" / "step_00000004")
    parent = read_run_state(tmp_path / "run" / "checkpoints" / "step_00000000")
    assert state.history["weights"] == {"step": 0, "history_hash": parent.history_hash}

    capsys.readouterr()
    assert main(["export", str(tmp_path / "mlm"), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["is_causal"]) == (["Qwen2ForCausalLM"], False)
    assert config["max_position_embeddings"] == SIZES["max_position_embeddings"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Begun with the weights of a `Qwen2ForCausalLM`: `model.safetensors` (sha256" in card
    assert "| mlm | mlm" in card
    pooling = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())
    assert pooling["max_seq_length"] == 32 < SIZES["max_position_embeddings"]  # what it was trained at
    assert "cuts texts at 32 tokens" in card
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert compare(str(tmp_path / "mlm"), tmp_path / "out", windows=2, say=lambda _line: None)
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    again = find(str(tmp_path / "again"))
    assert again.config.model.identity() == find(str(tmp_path / "mlm")).config.model.identity()


def test_a_modernbert_decoder_becomes_an_encoder_and_a_decoder_again(prepared, tmp_path):
    """Import, CLM -> MLM -> CLM, an export at each end, the losses of both classes on validation data; back in."""
    save("modernbert-decoder", tmp_path / "hf", prepared / "tokenizer")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    config = config_of(prepared, tmp_path, phases=[{"name": "clm", "objective": "clm", "steps": 2}, {
        "name": "mlm", "objective": "mlm", "steps": 2}, {"name": "again", "objective": "clm", "steps": 2}])
    assert main(["pretrain", str(config), "data.sequence_length=32"]) == 0
    for step, kind, auto in ((2, "ModernBertDecoderForCausalLM", "AutoModelForCausalLM"),
                             (4, "ModernBertForMaskedLM", "AutoModelForMaskedLM"),
                             (6, "ModernBertDecoderForCausalLM", "AutoModelForCausalLM")):
        run, out = f"{tmp_path / 'mlm'}@{step}", tmp_path / f"out{step}"
        assert main(["export", run, str(out)]) == 0
        assert type(getattr(transformers, auto).from_pretrained(out)).__name__ == kind
        assert compare(run, out, windows=2, say=lambda _line: None, texts=["return the retold wind"] * 2)
    hidden = transformers.AutoModel.from_pretrained(tmp_path / "out4")(torch.arange(9)[None]).last_hidden_state
    assert hidden.shape == (1, 9, SIZES["hidden_size"]) and hidden.isfinite().all()
    assert main(["import", str(tmp_path / "out4"), str(tmp_path / "again")]) == 0
    assert find(str(tmp_path / "again")).config.model.identity() == find(str(tmp_path / "mlm")).config.model.identity()


def test_the_first_step_starts_from_the_imported_weights(prepared, decoder, tmp_path):
    """A learning rate of next to nothing: the weights after a step are those that came in."""
    assert main(["import", str(decoder), str(tmp_path / "run")]) == 0
    config = config_of(prepared, tmp_path, optimizer={"lr": 1e-30}, phases=[
        {"name": "clm", "objective": "clm", "steps": 1}], schedule={"name": "constant"})
    assert main(["pretrain", str(config)]) == 0
    assert main(["export", str(tmp_path / "mlm"), str(tmp_path / "out")]) == 0
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
                     for path in (decoder, tmp_path / "out"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_two_ranks_by_the_command(decoder, tmp_path):
    run_cli("import", decoder, tmp_path / "run", "--nproc", "2")
    assert len(list((tmp_path / "run" / "checkpoints" / "step_00000000").glob("*.distcp"))) == 2
    assert compare(str(tmp_path / "run"), decoder, say=lambda _line: None, texts=["return the retold wind"] * 2)
    failed = run_cli("import", decoder, tmp_path / "run", "--nproc", "2", check=False)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "is there already" in failed.stderr


def test_a_run_directory_that_was_moved_is_found_with_its_tokenizer(decoder, tmp_path):
    assert main(["import", str(decoder), str(tmp_path / "run")]) == 0
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert find(str(tmp_path / "moved")).tokenizer.mask_id is not None


def test_what_is_there_is_never_overwritten(decoder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert main(["import", str(decoder), str(tmp_path / "run")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    (tmp_path / "run" / "thesis.tex").unlink()
    assert main(["import", str(decoder), str(tmp_path / "run")]) == 0  # an empty one may be there


def test_tokens_without_rows_are_refused(decoder, tmp_path, capsys):
    shutil.copytree(decoder, tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] += [{**content["added_tokens"][0], "id": 301 + number, "content": f"<{number}>"}
                                for number in range(9)]
    path.write_text(json.dumps(content))
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 2
    assert "go up to id" in capsys.readouterr().err


def test_a_fine_tuned_encoder_comes_back_without_its_task_head(prepared, tmp_path, capsys):
    save("eurobert", tmp_path / "encoder", prepared / "tokenizer")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=torch.arange(20)[None], labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "encoder" / name, tmp_path / "tuned" / name)
    capsys.readouterr()
    assert main(["import", str(tmp_path / "tuned"), str(tmp_path / "run")]) == 2
    assert "has no language-model head; with --new-head" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "tuned"), str(tmp_path / "run"), "--new-head"]) == 0
    assert "left out: classifier" in capsys.readouterr().out
    with whole_trunk(find(str(tmp_path / "run"))) as trunk:
        assert torch.equal(trunk.decoder.final_layernorm.weight, model.model.norm.weight)
        assert 0.01 < trunk.output_layer.weight.std() < 0.03
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    body = transformers.AutoModel.from_pretrained(tmp_path / "tuned")  # saved alone, its names have no prefix
    body.save_pretrained(tmp_path / "body")
    assert main(["import", str(tmp_path / "body"), str(tmp_path / "alone"), "--new-head"]) == 0
    assert compare(str(tmp_path / "alone"), tmp_path / "out", say=lambda _line: None)


def test_padding_of_minus_one_goes_out_as_it_came(prepared, tmp_path):
    """The first Llamas have it; transformers reads it and does not write it for generation."""
    save("llama2", tmp_path / "hf", prepared / "tokenizer")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": -1}))
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == -1


@pytest.mark.parametrize("name", ["smollm2", "embeddinggemma"])
def test_a_body_whose_head_is_its_embeddings_lacks_nothing(prepared, tmp_path, name):
    """As EmbeddingGemma was released."""
    model = save(name, tmp_path / "whole", prepared / "tokenizer")
    model.model.save_pretrained(tmp_path / "body")
    for file in (prepared / "tokenizer").iterdir():
        shutil.copyfile(file, tmp_path / "body" / file.name)
    assert "ForCausalLM" not in (tmp_path / "body" / "config.json").read_text()
    assert main(["import", str(tmp_path / "body"), str(tmp_path / "run")]) == 0
    assert compare(str(tmp_path / "run"), tmp_path / "whole", say=lambda _line: None)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0


def test_a_fine_tuned_modernbert_keeps_what_it_has_of_the_head(prepared, tmp_path, capsys):
    """Its classes for tasks have the dense layer and the norm of the head, a body alone has not: those are drawn."""
    save("modernbert", tmp_path / "encoder", prepared / "tokenizer")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    model.save_pretrained(tmp_path / "tuned")
    transformers.AutoModel.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "body")
    for name in ("tuned", "body"):
        assert main(["import", str(tmp_path / name), str(tmp_path / f"{name}-run"), "--new-head"]) == 0
        assert ("left out: classifier" in capsys.readouterr().out) == (name == "tuned")
        with whole_trunk(find(str(tmp_path / f"{name}-run"))) as trunk:
            assert torch.equal(trunk.decoder.final_layernorm.weight, model.model.final_norm.weight)
            assert not trunk.output_layer.bias.any()
            head = trunk.prediction_head
            if name == "tuned":
                assert torch.equal(head.dense.weight, model.head.dense.weight)
                assert torch.equal(head.norm.weight, model.head.norm.weight)
            else:
                assert 0.01 < head.dense.weight.std() < 0.03 and (head.norm.weight == 1).all()


def test_a_fine_tuned_decoder_saved_by_transformers_comes_back(decoder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    ids = torch.arange(30)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path / "tuned")
    assert main(["import", str(tmp_path / "tuned"), str(tmp_path / "run")]) == 0  # without a tokenizer
    assert compare(str(tmp_path / "run"), tmp_path / "tuned", say=lambda _line: None)


def test_a_disk_that_fills_leaves_nothing(decoder, tmp_path, monkeypatch, capsys):
    from megatron_encdec.engine import storage

    write = storage.HashedFile.write

    def full(self, data):
        if self.bytes > 20_000:
            self._error = OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(storage.HashedFile, "write", full)
    assert main(["import", str(decoder), str(tmp_path / "run")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
