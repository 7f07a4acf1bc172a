"""What a trunk can have and do without, and what of it a family has: `ModelConfig`'s keys at their values."""

from collections.abc import Mapping
from typing import Any

from megatron_encdec.model.config import WITHOUT, ModelConfig

MAY = object()  # a family's classes hold any value of a key
FEATURES = {"qkv_bias": "biases on queries, keys and values", "qk_norm": "norms on queries and keys",
            "layers_without_rope": "layers without rotary embeddings", "sliding_window": "sliding windows",
            "layers_without_window": "sliding windows of some layers alone",
            "local_rope_theta": "rotary base of its own in layers with a window", "norm": "LayerNorm",
            "embedding_norm": "norm behind the embeddings", "activation": "GeGLU", "prediction_head": "dense head",
            "norm_place": "norms behind attention and MLP", "norm_zero_centered": "zero-centred norms",
            "embedding_multiplier": "scaled embeddings", "residual_multiplier": "scaled residuals",
            "attention_multiplier": "scale of its own on the attention's scores",
            "attention_softcap": "bound on the attention's scores", "logits_scaling": "scaled logits",
            "logits_softcap": "bound on the logits", "attention_output_bias": "bias on the attention's output",
            "qk_norm_over": "norms over all heads together"}


def fixed(features: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose value is the same in all models of a family."""
    return {key: value for key, value in features.items() if value is not MAY and not callable(value)}


def misfit(model: ModelConfig, features: Mapping[str, Any]) -> str | None:
    """The first feature of the trunk that classes with `features` cannot hold, for people; None where they hold all.
    features: key -> `MAY`, the one value, or a function of the trunk that gives it; what is left out it never has."""
    for key, what in FEATURES.items():
        wanted, found = features.get(key, WITHOUT[key]), getattr(model, key)
        wanted = wanted(model) if callable(wanted) else wanted
        if wanted is MAY or found == wanted:
            continue
        if wanted == WITHOUT[key]:
            return f"it has no {what} (model.{key})"
        if found == WITHOUT[key]:
            return f"it always has {what}, this trunk has none (model.{key})"
        return f"it has model.{key}={wanted}, this trunk has {found}"
    return None
