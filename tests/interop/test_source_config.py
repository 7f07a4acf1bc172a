"""config.json: what is refused, and by which name."""

import json

import pytest
import transformers
from random_models import MODELS, build

from megatron_encdec.interop.source_config import read_source
from megatron_encdec.platform.errors import UserError


def written(directory, name="llama2", **changes):
    config = {**json.loads(build(name).config.to_json_string(use_diff=False)), "architectures": [MODELS[name][0]]}
    for key, value in changes.items():
        config[key] = value
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("llama2", {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "architecture GemmaForCausalLM.*gemma"),
    ("llama2", {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
    ("llama2", {"architectures": ["MistralForCausalLM"]}, "architectures says MistralForCausalLM, model_type says"),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama2", {"attention_bias": True}, "attention_bias=true"),
    ("qwen3", {"attention_bias": True}, "attention_bias=true"),
    ("eurobert", {"mlp_bias": True}, "mlp_bias=true"),
    ("llama2", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30.0 \(logit soft-capping\)"),
    ("llama2", {"num_local_experts": 8}, r"num_local_experts=8 \(mixture of experts\)"),
    ("llama2", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("llama2", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*quantised"),
    ("llama2", {"some_new_trick": 3}, "some_new_trick=3 .*--ignore some_new_trick"),
    ("llama2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
    ("llama2", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6,
                                    "long_factor": [2.0] * 6, "original_max_position_embeddings": 32}},
     "rope_type='longrope'"),
    ("llama2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor=0.5"),
    ("mistral", {"sliding_window": 0}, "sliding_window: .*0"),
    ("llama2", {"sliding_window": 16}, r"sliding_window=16 \(a sliding window\)"),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "layer_types": ["sliding_attention"] * 4},
     "layer_types of sliding_attention beside use_sliding_window=false, sliding_window=null"),
    ("smollm3", {"use_sliding_window": False, "sliding_window": 16, "layer_types": ["sliding_attention"] * 4},
     "layer_types of sliding_attention beside use_sliding_window=false, sliding_window=16"),
    ("qwen3", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
    ("llama2", {"num_attention_heads": 5}, "transformers refuses it.*not a multiple"),
    ("qwen2", {"num_key_value_heads": 4}, "num_query_groups: 4 does not divide"),
])
def test_refused_by_name(tmp_path, name, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        read_source(written(tmp_path, name, **changes))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("name", "changes"), [
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
    ("llama2", {"final_logit_softcapping": None, "num_local_experts": 0, "is_llama_config": True,
                "rope_interleaved": False, "temperature": 0.6, "_name_or_path": "x", "torch_dtype": "bfloat16"}),
    ("llama2", {"hidden_act": "swish"}),
])
def test_what_is_not_in_effect_is_no_obstacle(tmp_path, name, changes):
    assert read_source(written(tmp_path, name, **changes)).target.family.name == name.rstrip("2") or name == "qwen2"


@pytest.mark.parametrize(("name", "changes", "window", "without"), [
    ("mistral", {"sliding_window": 16}, 16, []), ("mistral", {"sliding_window": None}, None, []),
    ("mistral", {"sliding_window": 64}, 64, []),  # as long as the positions: kept, texts may be longer
    ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"] * 4}, 16, []),  # not read by that class
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16}, None, []),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "layer_types": None}, 16,
     [0, 1]),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4, "layer_types": None}, None,
     []),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "layer_types": None}, 16, []),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": None}, 16, [0, 1, 2]),  # with rope
])
def test_sliding_windows_are_those_that_transformers_computes(tmp_path, name, changes, window, without):
    model = read_source(written(tmp_path, name, **changes)).model
    assert (model.sliding_window, model.layers_without_window) == (window, without)


def test_a_key_that_means_nothing_can_be_ignored_and_remarks_are_made(tmp_path):
    directory = written(tmp_path, some_new_trick=3, attention_dropout=0.1, auto_map={"AutoModel": "x.Y"})
    source = read_source(directory, ignore=["some_new_trick"])
    assert len(source.remarks) == 2 and "auto_map" in source.remarks[0] and "0.1" in source.remarks[1]


def test_old_spellings_of_rope_are_understood(tmp_path):
    config = build("llama2").config.to_dict()
    del config["rope_parameters"]
    config |= {"architectures": ["LlamaForCausalLM"], "rope_theta": 777.0,
               "rope_scaling": {"type": "linear", "factor": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_source(tmp_path).model
    assert (model.rope_theta, model.rope_scaling.given) == (777.0, {"rope_type": "linear", "factor": 3.0})


def test_what_a_file_leaves_out_is_the_classes_default(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}))
    model, default = read_source(tmp_path).model, transformers.Qwen3Config()
    assert (model.head_dim, model.norm_eps, model.tied_embeddings) == (
        default.head_dim, default.rms_norm_eps, default.tie_word_embeddings)


@pytest.mark.parametrize(("content", "words"), [
    (None, "not a Hugging Face model directory"), ("{", "not valid JSON"), ("[]", "expected an object")])
def test_no_config_or_a_broken_one(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_source(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        read_source(tmp_path / "none")
