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
    ("llama2", {"mlp_bias": True}, "mlp_bias=true .biases in the MLP"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
    ("gemma3", {"is_causal": False}, "is_causal=false .a Gemma 3 that sees to both sides says"),
    ("eurobert", {"is_causal": True}, "is_causal=true .transformers' attention paths disagree"),
    ("modernbert", {"is_causal": True}, "is_causal=true"),
    ("llama2", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta=null"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": None}}},
     "rope_theta=null"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 9.0},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": None}}},
     "rope_theta=null"),
    ("embeddinggemma", {"sliding_window": 1}, "sliding_window below 2 with use_bidirectional_attention"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0 is not above 0"),
    ("gemma2", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar: -4 is not above 0"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation='gelu' .the trunk's activation is gelu_pytorch_tanh"),
    ("gemma3", {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
     "Gemma3ForConditionalGeneration .*not supported: a model of images and text; save its language model alone"),
    ("llama2", {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
     "BertForMaskedLM .*not supported: positions from a table, a norm behind each sum .*finetune and evaluate take it"),
    ("llama2", {"architectures": ["DebertaV2ForMaskedLM"], "model_type": "deberta-v2"}, "relative positions"),
    ("olmo3", {"sliding_window": None}, "sliding_attention beside sliding_window=null"),
    ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75"),
    ("eurobert", {"mlp_bias": True}, "mlp_bias=true"),
    ("llama2", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30.0 \(logit soft-capping\)"),
    ("llama2", {"num_local_experts": 8}, r"num_local_experts=8 \(mixture of experts\)"),
    ("llama2", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("llama2", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama2", {"quantization_config": {"quant_method": "gptq"}},
     r"quantization_config: quantised weights \(gptq\); import the model that they were made from"),
    ("llama2", {"architectures": ["NewModel"], "model_type": "new", "auto_map": {"AutoModel": "modeling.NewModel"}},
     r"NewModel .*code that comes with the model \(auto_map\), which is never run; .*import a model saved as"),
    ("modernbert", {"attention_bias": True}, r"attention_bias=True \(biases in the attention"),
    ("modernbert", {"mlp_bias": True}, "mlp_bias=True"), ("modernbert", {"norm_bias": True}, "norm_bias=True"),
    ("modernbert-decoder", {"classifier_bias": True}, "classifier_bias=True"),
    ("modernbert-decoder", {"decoder_bias": False}, "decoder_bias=False"),
    ("modernbert", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
    ("modernbert", {"classifier_activation": "relu"}, "classifier_activation='relu'"),
    ("modernbert", {"local_attention": 1}, "local_attention=1"),
    ("modernbert-decoder", {"is_causal": False}, "is_causal=false"),
    ("modernbert", {"layer_types": ["chunked_attention"] * 4}, "transformers refuses it"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4},
                                        "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}}},
     "rope_parameters.sliding_attention with rope_type='linear'"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
     "rope_type='dynamic'"),
    ("modernbert", {"num_experts": 4}, r"num_experts=4 \(mixture of experts"),
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


RELEASED = {  # the keys of a config.json of 2024 (transformers 4.47), in the sizes of a test
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean",
    "cls_token_id": 1, "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0,
    "eos_token_id": 2, "global_attn_every_n_layers": 2, "global_rope_theta": 160000.0, "gradient_checkpointing": False,
    "hidden_activation": "gelu", "hidden_size": 24, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02,
    "intermediate_size": 36, "layer_norm_eps": 1e-5, "local_attention": 128, "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert",
    "norm_bias": False, "norm_eps": 1e-5, "num_attention_heads": 2, "num_hidden_layers": 5, "pad_token_id": 3,
    "position_embedding_type": "absolute", "reference_compile": None, "repad_logits_with_grad": False,
    "sep_token_id": 2, "sparse_prediction": True, "sparse_pred_ignore_index": -100, "tie_word_embeddings": True,
    "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "vocab_size": 301}


@pytest.mark.parametrize("kind", ["ModernBertForMaskedLM", "ModernBertDecoderForCausalLM"])
def test_a_released_modernbert_is_understood(tmp_path, kind):
    content = {**RELEASED, "architectures": [kind]}
    if kind == "ModernBertDecoderForCausalLM":
        content["model_type"] = "modernbert-decoder"
    (tmp_path / "config.json").write_text(json.dumps(content))
    source = read_source(tmp_path)
    model = source.model
    assert (source.target.name, source.target.attention) == (
        ("modernbert", "bidirectional") if kind == "ModernBertForMaskedLM" else ("modernbert-decoder", "causal"))
    assert (model.sliding_window, model.layers_without_window, model.rope_theta, model.local_rope_theta) == (
        64, [0, 2, 4], 160000.0, 10000.0)
    assert (model.norm, model.activation, model.embedding_norm, model.prediction_head, model.tied_embeddings) == (
        "layernorm", "geglu", True, "dense", True)
    assert (model.num_query_groups, model.head_dim, model.max_positions) == (2, 12, 8192)
    assert source.remarks == []
    (tmp_path / "config.json").write_text(json.dumps({**content, "embedding_dropout": 0.1, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5e4}}}))
    said = "\n".join(read_source(tmp_path).remarks)
    assert "embedding_dropout 0.1" in said and "not global_rope_theta=160000.0" in said
    (tmp_path / "config.json").write_text(json.dumps({**content, "rope_theta": 333.0, "sliding_window": 3}))
    said = "\n".join(read_source(tmp_path).remarks)
    assert "rope_theta in config.json is not read" in said
    assert "sliding_window=3 is taken, not local_attention=128" in said


def test_an_adapter_alone_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(UserError, match="an adapter alone, for some/base; .*merge_and_unload"):
        read_source(tmp_path)


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
