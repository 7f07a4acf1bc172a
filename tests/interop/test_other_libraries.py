"""Exports in the libraries that people fine-tune them with; skipped where a library is not installed."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import transformers
from random_models import save

from megatron_encdec.interop.export import export
from megatron_encdec.interop.importing import import_model

SENTENCES = ["the encoder reads every word", "a mask"]


@pytest.fixture(scope="module", params=["llama2", "qwen2", "modernbert-decoder", "gemma3"])
def encoder(request, topology, tokenizer_directory, tmp_path_factory):
    """EuroBERT, a Qwen2 with is_causal false, a ModernBERT that was a decoder, a Gemma 3 seeing to both sides."""
    directory = tmp_path_factory.mktemp(request.param)
    save(request.param, directory / "hf", tokenizer_directory)
    import_model(directory / "hf", directory / "run", say=lambda _line: None)
    as_ = {"llama2": "eurobert", "qwen2": "qwen2-bidirectional", "modernbert-decoder": "modernbert",
           "gemma3": "gemma3_text-bidirectional"}[request.param]
    export(str(directory / "run"), directory / "out", as_, say=lambda _line: None)
    return directory / "out"


def run(code: str, *arguments) -> str:
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], text=True, capture_output=True,
                            timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result.stdout


def mean_pooled(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(directory)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="needs sentence-transformers")
def test_sentence_transformers_pools_the_mean(encoder, tmp_path):
    run("import sys, torch; from sentence_transformers import SentenceTransformer as S\n"
        "m = S(sys.argv[1], device='cpu', local_files_only=True)\n"
        "torch.save(m.encode(sys.argv[3:], convert_to_tensor=True), sys.argv[2]); m.save(sys.argv[2] + '-saved')",
        encoder, tmp_path / "found", *SENTENCES)
    torch.testing.assert_close(torch.load(tmp_path / "found"), mean_pooled(encoder), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="needs sentence-transformers")
def test_sentence_transformers_and_an_empty_text(encoder):
    """What the model card offers in its place has a vector, the same alone and in a batch; the empty text has none."""
    assert "an empty text has no token" in (encoder / "README.md").read_text().replace("An empty", "an empty")
    run("import sys, numpy; from sentence_transformers import SentenceTransformer as S\n"
        "m = S(sys.argv[1], device='cpu', local_files_only=True)\n"
        "alone, both = m.encode([' ']), m.encode([' ', '', sys.argv[2]])\n"
        "assert numpy.isfinite(both).all() and numpy.linalg.norm(alone[0]) > 0.1\n"
        "assert numpy.allclose(alone[0], both[0], atol=1e-5) and not both[1].any()", encoder, SENTENCES[0])


NEMO = """
import sys, torch
if not torch.cuda.is_available():  # it asks CUDA for a device's number, then for where to put the model
    number = iter([0])
    torch.cuda.current_device = lambda: next(number, torch.device("cpu"))
from nemo_automodel import NeMoAutoModelForCausalLM, NeMoAutoModelForSequenceClassification
path, kind, out = sys.argv[1:]
auto = NeMoAutoModelForSequenceClassification if kind == "classify" else NeMoAutoModelForCausalLM
# force_hf: it has a Qwen2ForCausalLM of its own, which it would take here and which knows no is_causal
model = auto.from_pretrained(path, torch_dtype=torch.float32, force_hf=True).eval()
torch.save(model(input_ids=torch.arange(9)[None]).logits.detach(), out)
print(type(model).__name__)
"""


@pytest.mark.skipif(find_spec("nemo_automodel") is None, reason="needs nemo-automodel")
def test_nemo_automodel_loads_it(encoder, tmp_path):
    assert "ForSequenceClassification" in run(NEMO, encoder, "classify", tmp_path / "logits")
