"""Frequencies are transformers', to the last bit; a scaling's keys are checked."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_encdec.model.rope import RopeScaling, frequencies, rotary_angles

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 2.5}, LLAMA3, {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0}, YARN,
    {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}, {**YARN, "attention_factor": 1.5}])
@pytest.mark.parametrize("theta", [10000.0, 5e5])
@pytest.mark.parametrize("head_dim", [64, 12])
def test_frequencies_are_those_of_transformers(scaling, theta, head_dim):
    config = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=32768,
                                      rope_parameters={"rope_theta": theta, **scaling})
    expected_D, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    ours_D, our_factor = frequencies(head_dim, theta, RopeScaling(**scaling))
    assert torch.equal(ours_D, expected_D) and our_factor == factor
    plain_D, _ = frequencies(head_dim, theta)
    assert not torch.equal(ours_D, plain_D)


def test_without_a_scaling_positions_turn_as_in_llama():
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=9000))
    cos, _ = rotary(torch.zeros(1), torch.arange(9000)[None])
    angles_SD, factor = rotary_angles(9000, 64, 10000.0, torch.device("cpu"))
    assert factor == 1.0 and torch.equal(angles_SD.cos(), cos[0, :, :32])


@pytest.mark.parametrize(("keys", "words"), [
    ({"rope_type": "linear"}, "factor: missing"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}, "beta_fast: is no key of rope_type linear"),
    ({**LLAMA3, "factor": -1.0}, "factor: -1.0 is not above 0")])
def test_keys_that_do_not_belong_together_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        RopeScaling(**keys)
