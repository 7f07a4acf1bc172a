"""Which class a checkpoint becomes, and what is refused."""

from pathlib import Path

import pytest
from random_models import MODERNBERT

from megatron_encdec.interop.families import TARGETS, check_fits, choose
from megatron_encdec.interop.hugging_face import hugging_face_config
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.rope import RopeScaling
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import load_tokenizer, train_tokenizer

GEMMA2 = dict(norm_place="both", norm_zero_centered=True, activation="geglu_tanh", embedding_multiplier=32**0.5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(iter(["a b c"] * 9), 264, tmp_path_factory.mktemp("tokenizer"))


def model_of(**changes):
    return ModelConfig(**{**dict(num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4,
                                 num_query_groups=2, vocabulary_size=264), **changes})


def test_auto_follows_the_objective_and_a_wish_goes_before_it():
    assert choose("auto", "clm", model_of()).model_class == "LlamaForCausalLM"
    assert choose("auto", "mlm", model_of()).model_class == "EuroBertForMaskedLM"
    assert choose("eurobert", "clm", model_of()).attention == "bidirectional"
    assert choose("auto", "clm", model_of(), source="mistral-bidirectional").attention == "bidirectional"
    with pytest.raises(UserError, match="--as gpt2: not one of auto, llama, eurobert"):
        choose("gpt2", "clm", model_of())
    with pytest.raises(UserError, match="no class is known for the objective 'denoise'"):
        choose("auto", "denoise", model_of())


@pytest.mark.parametrize(("changes", "causal", "encoder"), [
    ({}, "llama", "eurobert"),
    ({"family": "mistral"}, "mistral", "eurobert"),
    ({"family": "eurobert"}, "llama", "eurobert"),
    ({"hidden_size": 36, "num_attention_heads": 5, "num_query_groups": 1, "head_dim": 8}, "mistral",
     "mistral-bidirectional"),
    ({"qkv_bias": True}, "qwen2", "qwen2-bidirectional"),
    ({"qk_norm": True, "family": "qwen3"}, "qwen3", "qwen3-bidirectional"),
    ({"layers_without_rope": [0]}, "smollm3", "smollm3-bidirectional"),
    ({"family": "smollm3"}, "smollm3", "eurobert"),
    ({"sliding_window": 8}, "mistral", "mistral-bidirectional"),
    ({"sliding_window": 8, "num_layers": 2, "layers_without_window": [1]}, "smollm3", "smollm3-bidirectional"),
    ({"sliding_window": 8, "num_layers": 2, "layers_without_window": [1], "qkv_bias": True}, "qwen2",
     "qwen2-bidirectional"),
    ({**MODERNBERT, "num_layers": 2, "num_query_groups": 4}, "modernbert-decoder", "modernbert"),
    (GEMMA2, "gemma2", "gemma2-bidirectional"),
    ({**GEMMA2, "qk_norm": True}, "gemma3_text", "gemma3_text-bidirectional"),
    ({"qkv_bias": True, "attention_output_bias": True}, "llama", "eurobert"),
    ({"norm_place": "after", "qk_norm": True, "qk_norm_over": "heads"}, "olmo2", "olmo2-bidirectional"),
    ({"norm_place": "after", "qk_norm": True, "qk_norm_over": "heads", "sliding_window": 8}, "olmo3",
     "olmo3-bidirectional"),
    ({"residual_multiplier": 0.2}, "granite", "granite-bidirectional"),
    ({"family": "phi3"}, "phi3", "eurobert"),
])
def test_auto_takes_the_trunks_family_or_the_first_class_that_holds_it(changes, causal, encoder):
    assert choose("auto", "clm", model_of(**changes)).name == causal
    assert choose("auto", "mlm", model_of(**changes)).name == encoder


def test_what_no_class_or_not_this_class_can_hold_is_refused(tokenizer):
    uneven = model_of(hidden_size=36, num_attention_heads=5, num_query_groups=1, head_dim=8)
    for wish in ("llama", "eurobert"):
        with pytest.raises(UserError, match=f"--as {wish}.*hidden_size=36.*num_attention_heads=5"):
            check_fits(TARGETS[wish], uneven, tokenizer)
        check_fits(TARGETS[wish], model_of(head_dim=20), tokenizer)
    for wish, changes, words in (("eurobert", {"qkv_bias": True}, "biases on queries, keys, values"),
                                 ("llama", {"qk_norm": True}, "no norms on queries and keys"),
                                 ("qwen2", {}, "always has biases"),
                                 ("mistral", {"layers_without_rope": [0]}, "rotary"),
                                 ("eurobert", {"sliding_window": 8}, "no sliding windows .model.sliding_window"),
                                 ("mistral", {"sliding_window": 8, "num_layers": 2, "layers_without_window": [0]},
                                  "no sliding windows of some layers alone"),
                                 ("qwen3", {"qk_norm": True, "sliding_window": 8, "local_rope_theta": 50.0},
                                  "no rotary base of its own in layers with a window"),
                                 ("llama", {"norm": "layernorm"}, "no LayerNorm .model.norm"),
                                 ("eurobert", {"prediction_head": "dense"}, "no dense head"),
                                 ("modernbert", {}, "it always has LayerNorm, this trunk has none .model.norm"),
                                 ("modernbert", {**MODERNBERT, "num_layers": 2}, "num_query_groups=2"),
                                 ("modernbert-decoder", {**MODERNBERT, "num_layers": 2, "num_query_groups": 4,
                                                         "head_dim": 10}, "head_dim=10"),
                                 ("modernbert-decoder", {**MODERNBERT, "num_layers": 2, "num_query_groups": 4,
                                                         "qk_norm": True}, "no norms on queries and keys"),
                                 ("llama", {"qkv_bias": True}, "together, or none; here model.qkv_bias=True"),
                                 ("olmo2", {"attention_output_bias": True}, "model.attention_output_bias=True"),
                                 ("qwen2", {"qkv_bias": True, "attention_output_bias": True}, "no bias on the"),
                                 ("llama", {"norm_place": "both"}, "no norms behind attention and MLP"),
                                 ("llama", {"logits_scaling": 2.0}, "no scaled logits .model.logits_scaling"),
                                 ("gemma2", {**GEMMA2, "embedding_multiplier": 2.0},
                                  "it has model.embedding_multiplier=5.65.*this trunk has 2.0"),
                                 ("gemma2", {**GEMMA2, "norm_place": "after"}, "norm_place=both, this trunk has after"),
                                 ("gemma2", {**GEMMA2, "attention_multiplier": 0.3}, "root of a whole number"),
                                 ("gemma3_text", {**GEMMA2, "qk_norm": True, "attention_softcap": 5.0},
                                  "no bound on the attention's scores"),
                                 ("olmo2", {"qk_norm": True}, "it always has norms behind attention and MLP"),
                                 ("olmo2", {"qk_norm": True, "norm_place": "after"}, "norms over all heads"),
                                 ("phi3", {"rope_scaling": RopeScaling("linear", 2.0)}, "type linear")):
        with pytest.raises(UserError, match=f"--as {wish}: .* cannot hold this trunk: .*{words}"):
            check_fits(TARGETS[wish], model_of(**changes), tokenizer)
    with pytest.raises(UserError, match="no causal class of transformers holds this trunk.*Qwen2ForCausalLM: it has"):
        choose("auto", "clm", model_of(qkv_bias=True, qk_norm=True))


def test_an_encoder_needs_a_mask_token(tokenizer, tmp_path):
    plain = tmp_path / "tokenizer.json"
    plain.write_text((Path(tokenizer.path) / "tokenizer.json").read_text().replace("<|mask|>", "<|other|>"))
    without = load_tokenizer(plain)
    assert without.mask_id is None
    with pytest.raises(UserError, match="needs a mask token"):
        check_fits(TARGETS["eurobert"], model_of(), without)
    check_fits(TARGETS["llama"], model_of(), without)


def test_every_size_reaches_the_config(tokenizer):
    model = model_of(tied_embeddings=True, norm_eps=1e-3, rope_theta=777.0, head_dim=20)
    for wish in ("llama", "eurobert"):
        config = hugging_face_config(TARGETS[wish], model, 48, tokenizer)
        found = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
                 config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                 config.max_position_embeddings, config.rms_norm_eps, config.rope_parameters["rope_theta"],
                 config.tie_word_embeddings, config.pad_token_id, config.eos_token_id, config.bos_token_id)
        assert found == (264, 32, 40, 1, 4, 2, 20, 48, 1e-3, 777.0, True, tokenizer.pad_id,
                         tokenizer.eod_id, None)
    assert config.mask_token_id == tokenizer.mask_id


@pytest.mark.parametrize(("without", "first"), [([], 0), ([0, 1], 2), ([0, 2], None)])
def test_windows_reach_the_config_in_both_spellings(tokenizer, without, first):
    model = model_of(num_layers=4, sliding_window=8, layers_without_window=without, qkv_bias=True)
    config = hugging_face_config(TARGETS["qwen2"], model, 48, tokenizer)
    assert (config.use_sliding_window, config.sliding_window) == (True, 8)
    assert [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"] == without
    if first is not None:  # for readers that know no layer_types
        assert config.max_window_layers == first
    assert hugging_face_config(TARGETS["mistral"], model_of(sliding_window=8), 48, tokenizer).sliding_window == 8
    assert hugging_face_config(TARGETS["mistral"], model_of(), 48, tokenizer).sliding_window is None


@pytest.mark.parametrize("name", ["modernbert", "modernbert-decoder"])
def test_modernberts_config_has_windows_bases_and_tokens(tokenizer, name):
    model = model_of(**{**MODERNBERT, "num_layers": 4, "num_query_groups": 4, "layers_without_window": [0, 3]})
    special = {"bos": 7, "cls": 5, "sep": None}
    config = hugging_face_config(TARGETS[name], model, 48, tokenizer, special)
    assert (config.local_attention, config.sliding_window) == (12, 6)
    assert config.layer_types == ["full_attention", *["sliding_attention"] * 2, "full_attention"]
    assert {kind: one["rope_theta"] for kind, one in config.rope_parameters.items()} == {
        "full_attention": 900.0, "sliding_attention": 40.0}
    assert (config.bos_token_id, config.cls_token_id, config.sep_token_id, config.pad_token_id) == (
        7, 5, tokenizer.eod_id, tokenizer.pad_id)
    alone = hugging_face_config(TARGETS[name], model, 48, tokenizer)
    assert alone.bos_token_id == alone.cls_token_id == alone.sep_token_id == tokenizer.eod_id
