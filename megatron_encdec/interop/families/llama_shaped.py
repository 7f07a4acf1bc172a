"""What all families of a Llama's shape have in common: RMSNorm, a gated MLP, rotary positions, Llama's keys and names.

They differ in what a family always, never or sometimes has (`features`), and in how it says which layers have a window.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_encdec.interop.families.family import Family
from megatron_encdec.interop.families.features import MAY, fixed, misfit
from megatron_encdec.interop.families.rotary import (
    GEMMA_KEYS,
    both_parameters,
    read_both,
    read_rotary,
    refused_both,
    refused_rotary,
    remarks_of_both,
    rotary_parameters,
    rotary_remarks,
)
from megatron_encdec.model.config import ModelConfig

# `ModelConfig`'s key -> what all their configs call it
CONFIG_KEYS = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
               "num_attention_heads": "num_attention_heads", "num_query_groups": "num_key_value_heads",
               "head_dim": "head_dim", "tied_embeddings": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
               "init_std": "initializer_range", "vocabulary_size": "vocab_size"}
SILU = ("silu", "swish")


@dataclass(frozen=True)
class LlamaShaped(Family):
    """A family of a Llama's shape."""

    features: Mapping[str, Any] = field(default_factory=dict)  # see `misfit`
    whole_heads: bool = False  # its config refuses a hidden size that is no multiple of the heads
    settings: Mapping[str, Any] = field(default_factory=dict)  # what its config says besides what all have in common
    biases: bool = False  # has `attention_bias`: of queries, keys, values and the attention's output together
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", SILU)  # the key, and names of the one that it has
    two_rotaries: bool = False  # says how positions turn for layers with and without a window apart

    def read(self, config) -> dict[str, Any]:
        turns = read_both(config) if self.two_rotaries else read_rotary(config.rope_parameters, config)
        biases = dict.fromkeys(("qkv_bias", "attention_output_bias"), True)
        return {**{ours: getattr(config, theirs, None) for ours, theirs in CONFIG_KEYS.items()}, **turns,
                **fixed(self.features), **(biases if self.biases and config.attention_bias else {})}

    def refused(self, config) -> list[str]:
        found, (key, names) = [], self.activation
        if (activation := getattr(config, key)) not in names:
            found.append(f"{key}={activation!r} (the trunk's activation is {names[0]}, gated)")
        for key, where in (("attention_bias", "on the attention's output"), ("mlp_bias", "in the MLP")):
            if getattr(config, key, False) and not (self.biases and key == "attention_bias"):
                found.append(f"{key}=true (biases {where})")
        types = set(getattr(config, "layer_types", None) or [])
        if strange := types - {"full_attention", "sliding_attention"}:
            found.append(f"layer_types {', '.join(sorted(strange))}")
        if "sliding_attention" in types and not (getattr(config, "use_sliding_window", True) and config.sliding_window):
            said = {key: json.dumps(getattr(config, key)) for key in ("use_sliding_window", "sliding_window")
                    if hasattr(config, key)}
            found.append("layer_types of sliding_attention beside "
                         f"{', '.join(f'{key}={value}' for key, value in said.items())} "
                         "(transformers' attention paths disagree on that)")
        return found + (refused_both(config) if self.two_rotaries
                        else refused_rotary(config.rope_parameters, config))

    def remarks(self, content: dict[str, Any], config) -> list[str]:
        return (remarks_of_both(content, config, GEMMA_KEYS) if self.two_rotaries
                else rotary_remarks(content, config))

    def write(self, model: ModelConfig) -> dict[str, Any]:
        key, names = self.activation
        turns = (both_parameters(model) if self.two_rotaries
                 else rotary_parameters(model.rope_theta, model.rope_scaling))
        return {**{theirs: getattr(model, ours) for ours, theirs in CONFIG_KEYS.items()}, key: names[0],
                "rope_parameters": turns, **self.settings,
                **({"attention_bias": model.attention_output_bias} if self.biases else {})}

    def refuses(self, model: ModelConfig) -> str | None:
        if self.whole_heads and model.hidden_size % model.num_attention_heads:
            return (f"its hidden size must be a multiple of the heads; here model.hidden_size={model.hidden_size}, "
                    f"model.num_attention_heads={model.num_attention_heads}")
        if not self.biases:
            return misfit(model, self.features)
        if model.qkv_bias != model.attention_output_bias:
            return ("it has biases on queries, keys, values and the attention's output together, or none; here "
                    f"model.qkv_bias={model.qkv_bias}, model.attention_output_bias={model.attention_output_bias}")
        return misfit(model, {**self.features, "qkv_bias": MAY, "attention_output_bias": MAY})
