"""Which class a checkpoint becomes, and what is refused."""

from pathlib import Path

import pytest

from megatron_encdec.interop.targets import check_fits, choose, hugging_face_config
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(iter(["a b c"] * 9), 264, tmp_path_factory.mktemp("tokenizer"))


def model_of(**changes):
    return ModelConfig(**{**dict(num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4,
                                 num_query_groups=2, vocabulary_size=264), **changes})


def test_auto_follows_the_objective_and_a_wish_goes_before_it():
    assert choose("auto", "clm").model_class == "LlamaForCausalLM"
    assert choose("auto", "mlm").model_class == "EuroBertForMaskedLM"
    assert choose("eurobert", "clm").attention == "bidirectional"
    with pytest.raises(UserError, match="--as gpt2: not one of auto, llama, eurobert"):
        choose("gpt2", "clm")
    with pytest.raises(UserError, match="no class is known for the objective 'denoise'"):
        choose("auto", "denoise")


def test_sizes_that_the_class_cannot_hold_are_refused(tokenizer):
    uneven = model_of(hidden_size=36, num_attention_heads=5, num_query_groups=1, head_dim=8)
    for wish in ("llama", "eurobert"):
        with pytest.raises(UserError, match=f"--as {wish}.*hidden_size=36.*num_attention_heads=5"):
            check_fits(choose(wish, "clm"), uneven, tokenizer)
        check_fits(choose(wish, "clm"), model_of(head_dim=20), tokenizer)


def test_an_encoder_needs_a_mask_token(tokenizer, tmp_path):
    plain = tmp_path / "tokenizer.json"
    plain.write_text((Path(tokenizer.path) / "tokenizer.json").read_text().replace("<|mask|>", "<|other|>"))
    without = load_tokenizer(plain)
    assert without.mask_id is None
    with pytest.raises(UserError, match="needs a mask token"):
        check_fits(choose("eurobert", "clm"), model_of(), without)
    check_fits(choose("llama", "clm"), model_of(), without)


def test_every_size_reaches_the_config(tokenizer):
    model = model_of(tied_embeddings=True, norm_eps=1e-3, rope_theta=777.0, head_dim=20)
    for wish in ("llama", "eurobert"):
        config = hugging_face_config(choose(wish, "clm"), model, 48, tokenizer)
        found = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
                 config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                 config.max_position_embeddings, config.rms_norm_eps, config.rope_parameters["rope_theta"],
                 config.tie_word_embeddings, config.pad_token_id, config.eos_token_id, config.bos_token_id)
        assert found == (264, 32, 40, 1, 4, 2, 20, 48, 1e-3, 777.0, True, tokenizer.pad_id,
                         tokenizer.eod_id, None)
    assert config.mask_token_id == tokenizer.mask_id
