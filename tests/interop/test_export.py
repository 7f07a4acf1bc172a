"""From a real run's checkpoints to directories that stock transformers loads in a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from check_parity import compare

from megatron_encdec.cli import main
from megatron_encdec.engine import loading
from megatron_encdec.interop.export import export
from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.hugging_face import trunk_logits
from megatron_encdec.interop.names import canonical_weights
from megatron_encdec.interop.source import find, whole_trunk
from megatron_encdec.interop.tokenizer_files import about_empty_texts
from megatron_encdec.model.trunk import Trunk, transformer_config
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.platform.errors import UserError

CLM_END, END = 6, 9
STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
masked, causal = sys.argv[1:]
out = {}
for name, auto, path in (("masked", AutoModelForMaskedLM, masked), ("causal", AutoModelForCausalLM, causal)):
    model, info = auto.from_pretrained(path, output_loading_info=True)
    ids = AutoTokenizer.from_pretrained(path)("return the retold wind", return_tensors="pt").input_ids
    out[name] = {"class": type(model).__name__, "dtype": str(model.dtype),
                 "keys": [len(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")],
                 "ids": ids[0].tolist(), "logits": model(ids).logits[0].tolist()}
fill = pipeline("fill-mask", masked)
out["guesses"] = [guess["token"] for guess in fill("return the " + fill.tokenizer.mask_token + " wind")]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def exported(run_directory, tmp_path_factory):
    """(masked, causal): exports of the last step and of the end of the causal phase."""
    directory = tmp_path_factory.mktemp("exported")
    export(str(run_directory), directory / "masked")
    export(f"{run_directory}@{CLM_END}", directory / "causal")
    return directory / "masked", directory / "causal"


def test_stock_transformers_loads_both_and_fills_masks(exported, run_directory):
    result = subprocess.run([sys.executable, "-c", STOCK, *map(str, exported)], capture_output=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=300,
                            text=True)
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout.splitlines()[-1])
    tokenizer = find(str(run_directory)).tokenizer
    assert len(out["guesses"]) == 5
    for name, target, step in (("masked", "eurobert", END), ("causal", "llama", CLM_END)):
        found = out[name]
        assert (found["class"], found["dtype"]) == (TARGETS[target].model_class, "torch.float32")
        assert found["keys"] == [0, 0, 0]  # missing, unexpected, mismatched
        assert found["ids"] == tokenizer.encode("return the retold wind")
        with whole_trunk(find(f"{run_directory}@{step}")) as trunk:
            ours = trunk_logits(trunk, torch.tensor([found["ids"]]), TARGETS[target].attention)[0]
        assert (ours - torch.tensor(found["logits"])).abs().max() < 1e-4


def test_every_comparison_agrees_and_another_step_does_not(exported, run_directory):
    masked, causal = exported
    lines = []
    assert compare(f"{run_directory}@{END}", masked, say=lines.append)
    assert [line[:5].strip() for line in lines] == ["ok"] * 4
    assert not compare(f"{run_directory}@{CLM_END}", masked, say=lines.append)
    assert compare(f"{run_directory}@{CLM_END}", causal, windows=2, say=lines.append)


def test_the_masters_are_what_the_bf16_weights_were_rounded_from(run_directory):
    source = find(str(run_directory))
    assert source.has_masters
    topology = Topology(1, 0, 1, 1, 1, 0, 0, 0)
    with whole_trunk(source) as trunk:
        masters = {name: tensor.clone() for name, tensor in canonical_weights(trunk).items()}
        settings = transformer_config(source.config.model, topology, torch.bfloat16, False)
        rounded = Trunk(source.config.model, settings, "torch", topology, 64)
        loading.load(source.checkpoint, rounded)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters.values())
    for name, tensor in canonical_weights(rounded).items():
        assert torch.equal(masters[name].bfloat16(), tensor), name


def test_the_same_export_again_does_nothing_another_needs_force(exported, run_directory, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(exported[0], out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    said = []
    assert export(f"{run_directory}@{END}", out, say=said.append) is None
    assert "already" in said[0]
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}

    with pytest.raises(UserError, match="another export.*step 9, as eurobert, fp32.*--force"):
        export(str(run_directory), out, dtype="bf16")
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes/mine.txt beside an export.*move it away"):
        export(str(run_directory), out, dtype="bf16", force=True)
    shutil.rmtree(out / "notes")
    (tmp_path / ".copy.tmp").mkdir()  # what an export that was killed left behind
    (tmp_path / ".copy.tmp" / "junk").touch()
    export(str(run_directory), out, dtype="bf16", force=True, say=said.append)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert compare(str(run_directory), out, say=said.append)
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]
    assert {file.stat().st_mode for file in out.rglob("*") if file.is_file()} == {(out / "config.json").stat().st_mode}
    assert not (out / "junk").exists()


def test_foreign_files_are_never_overwritten(run_directory, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="is a file"):
            export(str(run_directory), tmp_path / "file", force=force)
        with pytest.raises(UserError, match="no export of ours"):
            export(str(run_directory), tmp_path / "full", force=force)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


def test_a_clm_checkpoint_becomes_an_encoder_on_request_in_an_empty_directory(run_directory, tmp_path):
    (tmp_path / "empty").mkdir()
    assert export(f"{run_directory}@{CLM_END}", tmp_path / "empty", as_="eurobert", say=lambda _line: None) < 1e-4
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["architectures"] == ["EuroBertForMaskedLM"]
    assert json.loads((tmp_path / "empty" / "export.json").read_text())["as"] == "eurobert"


def test_the_card_tells_what_the_run_did(exported, run_directory):
    masked, causal = ((path / "README.md").read_text() for path in exported)
    state = json.loads((run_directory / "checkpoints" / "step_00000009" / "run_state.json").read_text())
    assert "| causal | clm | 1–6 | 3,072 |" in masked and "| causal | clm | 1–6 | 3,072 |" in causal
    assert "| masked | mlm (mask_ratio 0.3" in masked and "| masked |" not in causal
    assert state["history_hash"] in masked and state["history_hash"] not in causal
    assert state["data_fingerprints"][0] in masked
    assert "validation loss by objective (step 9)" in masked and "(step 6)" in causal
    assert str(run_directory.parent) not in masked


def test_an_encoder_whose_empty_text_has_no_vector_says_so(exported, tmp_path):
    masked, causal = ((path / "README.md").read_text() for path in exported)
    assert "An empty text has no token" in masked and "put ' ' in its place" in masked
    assert "no token" not in causal
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[0])
    assert tokenizer("")["input_ids"] == [] and tokenizer(" ")["input_ids"]
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("<|endoftext|>", end), ("<|endoftext|>", end))  # as encoders with [CLS] have it
    tokenizer.save_pretrained(tmp_path)
    assert about_empty_texts(tmp_path) == []


def test_mistakes_get_one_line(run_directory, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        export(f"{run_directory}@7", tmp_path / "out")
    moved = tmp_path / "run"
    shutil.copytree(run_directory, moved)
    config = moved / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(run_directory.parent / "tokenizer"), "no/such/tokenizer"))
    with pytest.raises(UserError, match="tokenizer.path no/such/tokenizer is not there"):
        export(str(moved), tmp_path / "out")
    other = tmp_path / "tokenizer"
    shutil.copytree(run_directory.parent / "tokenizer", other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content))
    config.write_text(text.replace(str(run_directory.parent / "tokenizer"), str(other)))
    with pytest.raises(UserError, match="not the tokenizer of step_00000009"):
        export(str(moved), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_objective_that_sees_both_sides_becomes_an_encoder(prepared, tmp_path):
    """auto; and the card does not offer to fill in a mask where the head was trained for another position."""
    phases = ("[{name: shifted, objective: mntp, steps: 1}, {name: diffusion, objective: mdlm, steps: 1}, {name: both, "
              "objective: {name: mixture, parts: [{objective: clm}, {objective: {name: mlm, unit: word}}]}, steps: 1}, "
              "{name: turns, objective: {name: alternate, cycle: [{objective: mlm, steps: 1}, {objective: clm, "
              "steps: 1}]}, steps: 2}]")
    assert main(["pretrain", str(prepared / "config.yaml"), f"run.dir={tmp_path / 'run'}", f"phases={phases}",
                 "schedule={name: constant}", "checkpoint.keep=9", "checkpoint.every=1"]) == 0
    cards = {}
    for step in range(1, 6):
        said = []
        assert export(f"{tmp_path / 'run'}@{step}", tmp_path / str(step), say=said.append) < 1e-4
        config = json.loads((tmp_path / str(step) / "config.json").read_text())
        cards[step] = (tmp_path / str(step) / "README.md").read_text()
        assert config["architectures"] == ["EuroBertForMaskedLM" if step < 5 else "LlamaForCausalLM"]
        assert ("pipeline_tag: feature-extraction" in cards[step]) == (step == 1)
        assert any("mntp, whose head predicts the token one position after" in line for line in said) == (step == 1)
    assert "| both | mixture (1 clm, 1 mlm:0.4 (word)) | 3–3 |" in cards[3]
    assert "tags: [megatron_encdec, mixture]" in cards[3] and "tags: [megatron_encdec, mlm]" in cards[4]
    run = json.loads((tmp_path / "3" / "export.json").read_text())["run"]
    assert [one["name"] for one in run["phases"]] == ["mntp40", "mdlm", "mixture_1clm_1mlm40word"]
