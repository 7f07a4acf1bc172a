"""Every family: from Hugging Face and back, equal tensor by tensor, and the same logits on the way."""

import json
from functools import cache

import pytest
import torch
from random_models import MODELS, build, kind_of, save
from safetensors.torch import load_file

from megatron_encdec.interop.export import export
from megatron_encdec.interop.hugging_face import logits_difference, trunk_logits
from megatron_encdec.interop.importing import Wish, import_model
from megatron_encdec.interop.names import from_hugging_face
from megatron_encdec.interop.source import find, whole_trunk
from megatron_encdec.interop.source_config import read_source

ENCODERS = {"LlamaForCausalLM": "eurobert", "EuroBertForMaskedLM": "eurobert", "MistralForCausalLM":
            "mistral-bidirectional", "Qwen2ForCausalLM": "qwen2-bidirectional", "Qwen3ForCausalLM":
            "qwen3-bidirectional", "SmolLM3ForCausalLM": "smollm3-bidirectional", "ModernBertForMaskedLM": "modernbert",
            "ModernBertDecoderForCausalLM": "modernbert", "Gemma2ForCausalLM": "gemma2-bidirectional",
            "Gemma3ForCausalLM": "gemma3_text-bidirectional", "Olmo2ForCausalLM": "olmo2-bidirectional",
            "Olmo3ForCausalLM": "olmo3-bidirectional", "GraniteForCausalLM": "granite-bidirectional",
            "Phi3ForCausalLM": "phi3-bidirectional"}


def quiet(_line):
    pass


def tensors(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def as_trunk(directory):
    """Its tensors under the trunk's names: of two classes of a shape, the same."""
    source = read_source(directory)
    return from_hugging_face(tensors(directory), source.model, source.target.family.rows)


@pytest.fixture(scope="module")
def imported(topology, tokenizer_directory, tmp_path_factory):
    """imported(name) -> (the model, the directory with it in `hf` and its import in `run`), made once."""
    @cache
    def make(name):
        directory = tmp_path_factory.mktemp(name)
        model = save(name, directory / "hf", tokenizer_directory, file_size="40KB")
        import_model(directory / "hf", directory / "run", say=quiet)
        return model, directory
    return make


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_equal_tensor_by_tensor(imported, tokenizer_directory, tmp_path, name):
    model, came = imported(name)
    with whole_trunk(find(str(came / "run"))) as trunk:
        kind = kind_of(name)
        for windows, length in ((1, 64), (3, 17)):  # to the last position: a scaling shows there
            assert logits_difference(trunk, model, kind, windows, length) < 1e-4
        other = {"causal": "bidirectional", "bidirectional": "causal"}[kind]
        assert logits_difference(trunk, model, other) > 0.1

    assert export(str(came / "run"), tmp_path / "out", say=quiet, file_size="40KB") < 1e-4
    before, after = tensors(came / "hf"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype, key
    then, now = (json.loads((part / "config.json").read_text()) for part in (came / "hf", tmp_path / "out"))
    assert then == now and now["architectures"] == [MODELS[name][0]]
    files = [file.name for file in tokenizer_directory.iterdir()]
    assert all((came / "hf" / file).read_bytes() == (tmp_path / "out" / file).read_bytes() for file in files)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1  # files of at most 40KB


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_on_request_is_the_decoders_weights_seen_bidirectionally(imported, tmp_path, name):
    _, came = imported(name)
    difference = export(str(came / "run"), tmp_path / "out", ENCODERS[MODELS[name][0]], say=quiet)
    assert difference < 1e-4  # compared under bidirectional attention
    before, after = (as_trunk(directory) for directory in (came / "hf", tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    # and an encoder of whatever class is imported as one
    import_model(tmp_path / "out", tmp_path / "again", say=quiet)
    source = find(str(tmp_path / "again"))
    assert (source.state.objective, source.imported["as"]) == ("mlm", ENCODERS[MODELS[name][0]])
    assert export(str(tmp_path / "again"), tmp_path / "back", say=quiet) < 1e-4
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_the_dtype_that_they_came_in(topology, tokenizer_directory, tmp_path, dtype):
    save("qwen2", tmp_path / "hf", tokenizer_directory, dtype)
    import_model(tmp_path / "hf", tmp_path / "run", say=quiet)
    export(str(tmp_path / "run"), tmp_path / "out", say=quiet)
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "out")
    assert all(after[key].dtype == dtype and torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize(("name", "heads", "groups"), [
    *((name, *heads) for name in ("llama3", "qwen2", "qwen3", "gemma3", "olmo2", "granite", "phi3")
      for heads in ((3, 1), (9, 3), (5, 5))),
    *((name, heads, None) for name in ("modernbert", "modernbert-decoder") for heads in (3, 5))])
def test_odd_numbers_of_heads(topology, tmp_path, name, heads, groups):
    changes = dict(num_attention_heads=heads, hidden_size=heads * 8)
    changes |= dict(num_key_value_heads=groups, head_dim=8) if groups else {}
    model = save(name, tmp_path / "hf", None, **changes)
    import_model(tmp_path / "hf", tmp_path / "run", Wish(mask="none"), say=quiet)  # and without a tokenizer
    with whole_trunk(find(str(tmp_path / "run"))) as trunk:
        assert logits_difference(trunk, model, "bidirectional" if name == "modernbert" else "causal") < 1e-4
    export(str(tmp_path / "run"), tmp_path / "out", say=quiet)
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_layers_without_rotary_embeddings_matter(topology, tmp_path):
    """SmolLM3's pattern is applied to the right layers: moving it changes what comes out."""
    model = save("smollm3", tmp_path / "hf", None, no_rope_layers=[1, 0, 1, 1])
    moved = build("smollm3", no_rope_layers=[1, 1, 0, 1])
    moved.load_state_dict(model.state_dict())
    import_model(tmp_path / "hf", tmp_path / "run", Wish(mask="none"), say=quiet)
    with whole_trunk(find(str(tmp_path / "run"))) as trunk:
        tokens_BS = torch.arange(40)[None]
        ours = trunk_logits(trunk, tokens_BS, "causal")
        with torch.no_grad():
            assert (ours - model(tokens_BS).logits).abs().max() < 1e-4
            assert (ours - moved(tokens_BS).logits).abs().max() > 1e-2
