"""Released models of every family, trained on: imported, MLM on top of what they were, out as an encoder that others
load."""

import json

import pytest
import torch
import transformers
from random_models import save
from small_run import metrics, run_cli

FAMILIES = {"embeddinggemma": "gemma3_text-bidirectional", "olmo3": "olmo3-bidirectional",
            "granite": "granite-bidirectional", "phi3-window": "phi3-bidirectional"}
MORE = {"llama-biases": "eurobert", "qwen3-window": "qwen3-bidirectional", "modernbert-decoder": "modernbert",
        "gemma2": "gemma2-bidirectional", "gemma3": "gemma3_text-bidirectional", "olmo2": "olmo2-bidirectional"}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_model_is_trained_on_and_goes_out_as_an_encoder(name, root, tmp_path):
    save(name, tmp_path / "hf", root / "tokenizer")
    run_cli("import", tmp_path / "hf", tmp_path / "imported")
    run = tmp_path / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", f"run.from.path={tmp_path / 'imported'}",
            "run.from.state=weights", f"model={{run: {tmp_path / 'imported'}}}",
            f"tokenizer.path={tmp_path / 'imported' / 'tokenizer'}", "schedule={name: constant}", "optimizer.lr=3e-3",
            "phases=[{name: masked, objective: mlm:0.3, steps: 6}]")
    losses = [line["loss"] for line in metrics(run)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    run_cli("export", run, tmp_path / "out")
    record, config = (json.loads((tmp_path / "out" / file).read_text()) for file in ("export.json", "config.json"))
    assert record["as"] == (FAMILIES | MORE)[name]
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(encoder).__name__.startswith(config["architectures"][0].partition("For")[0])
    tokens_BS = torch.arange(20, 40)[None]
    with torch.no_grad():
        hidden_BSH = encoder(tokens_BS).last_hidden_state
        moved_BSH = encoder(torch.cat([tokens_BS[:, :-1], tokens_BS[:, -1:] + 1], dim=1)).last_hidden_state
    assert (hidden_BSH - moved_BSH)[0, -2].abs().max() > 1e-5  # sees what comes after
