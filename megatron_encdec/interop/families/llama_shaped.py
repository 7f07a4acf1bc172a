"""What all families of a Llama's shape have in common: RMSNorm before attention and MLP, SwiGLU, rotary positions.

They differ in what a family always or never has (`features`), and in how it says which layers have a window.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_encdec.interop.families.family import Family
from megatron_encdec.interop.families.rotary import (
    read_rotary,
    refused_rotary,
    rotary_parameters,
    rotary_remarks,
)
from megatron_encdec.model.config import ModelConfig

# `ModelConfig`'s key -> what all their configs call it
CONFIG_KEYS = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
               "num_attention_heads": "num_attention_heads", "num_query_groups": "num_key_value_heads",
               "head_dim": "head_dim", "tied_embeddings": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
               "init_std": "initializer_range", "vocabulary_size": "vocab_size"}
FEATURES = {"qkv_bias": "biases on queries, keys and values", "qk_norm": "norms on queries and keys",
            "layers_without_rope": "layers without rotary embeddings", "sliding_window": "sliding windows",
            "layers_without_window": "sliding windows of some layers alone",
            "local_rope_theta": "rotary base of its own in layers with a window", "norm": "LayerNorm",
            "embedding_norm": "norm behind the embeddings", "activation": "GeGLU", "prediction_head": "dense head"}
NO_BIASES = {"attention_bias": False, "mlp_bias": False}


@dataclass(frozen=True)
class LlamaShaped(Family):
    """A family of a Llama's shape."""

    features: Mapping[str, bool] = field(default_factory=dict)  # keys of `FEATURES` it can have; True: always has
    whole_heads: bool = False  # its config refuses a hidden size that is no multiple of the heads
    settings: Mapping[str, Any] = field(default_factory=dict)  # what its config says besides what all have in common

    def read(self, config) -> dict[str, Any]:
        return {**{ours: getattr(config, theirs, None) for ours, theirs in CONFIG_KEYS.items()},
                **read_rotary(config.rope_parameters, config), "qkv_bias": bool(self.features.get("qkv_bias")),
                "qk_norm": bool(self.features.get("qk_norm"))}

    def refused(self, config) -> list[str]:
        found = []
        if config.hidden_act not in ("silu", "swish"):
            found.append(f"hidden_act={config.hidden_act!r} (the trunk's activation is SwiGLU's silu)")
        for key, where in (("attention_bias", "on the attention's output"), ("mlp_bias", "in the MLP")):
            if getattr(config, key, False):
                found.append(f"{key}=true (biases {where})")
        types = set(getattr(config, "layer_types", None) or [])
        if strange := types - {"full_attention", "sliding_attention"}:
            found.append(f"layer_types {', '.join(sorted(strange))}")
        if "sliding_attention" in types and hasattr(config, "use_sliding_window") and not (
                config.use_sliding_window and config.sliding_window):
            found.append("layer_types of sliding_attention beside use_sliding_window="
                         f"{json.dumps(config.use_sliding_window)}, sliding_window={json.dumps(config.sliding_window)} "
                         "(transformers' attention paths disagree on that)")
        return found + refused_rotary(config.rope_parameters, config)

    def remarks(self, content: dict[str, Any], config) -> list[str]:
        return rotary_remarks(content, config)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {**{theirs: getattr(model, ours) for ours, theirs in CONFIG_KEYS.items()}, "hidden_act": "silu",
                "rope_parameters": rotary_parameters(model.rope_theta, model.rope_scaling), **self.settings}

    def refuses(self, model: ModelConfig) -> str | None:
        if self.whole_heads and model.hidden_size % model.num_attention_heads:
            return (f"its hidden size must be a multiple of the heads; here model.hidden_size={model.hidden_size}, "
                    f"model.num_attention_heads={model.num_attention_heads}")
        identity = model.identity()  # without what the trunk does without
        for key, what in FEATURES.items():
            has = key in identity
            if has and key not in self.features:
                return f"it has no {what} (model.{key})"
            if not has and self.features.get(key):
                return f"it always has {what}, this trunk has none (model.{key})"
        return None
