"""Rotary embeddings in configs: `rope_parameters`, and what of them the trunk computes.

Some families have one for all layers; ModernBERT, Gemma 3 and OLMo 3 have one for global layers and another for those
with a window (`..._both`).
"""

from typing import Any

from megatron_encdec.interop.families.windows import read_windows
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.rope import RopeScaling
from megatron_encdec.platform import schema

_KNOWN = ("default", "linear", "llama3", "yarn")
# what older configs call the bases of global layers and of those with a window
MODERNBERT_KEYS, GEMMA_KEYS = ("global_rope_theta", "local_rope_theta"), ("rope_theta", "rope_local_base_freq")


def read_rotary(parameters: dict[str, Any] | None, config) -> dict[str, Any]:
    """`ModelConfig`'s keys `rope_theta` and `rope_scaling`."""
    rope = dict(parameters or {"rope_type": "default", "rope_theta": 10000.0})
    for key in ("type", "partial_rotary_factor", "mrope_section"):
        rope.pop(key, None)
    theta = float(rope.pop("rope_theta"))
    if rope["rope_type"] == "yarn" and rope.get("factor") is None and "original_max_position_embeddings" in rope:
        rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    scaling = None if rope["rope_type"] == "default" else schema.build(RopeScaling, rope, "rope_parameters")
    return {"rope_theta": theta, "rope_scaling": scaling}


def refused_rotary(parameters: dict[str, Any] | None, config) -> list[str]:
    """What of them the trunk does not compute."""
    rope, found = parameters or {}, []
    if any(isinstance(value, dict) for value in rope.values()):
        return ["rope_parameters that differ between layers"]
    if rope and rope.get("rope_theta") is None:
        found.append("rope_theta=null (a rotary embedding without a base)")
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if part not in (None, 1.0):
        found.append(f"partial_rotary_factor={part} (rotary embeddings of a part of each head)")
    if rope.get("rope_type") not in _KNOWN:
        found.append(f"rope_type={rope.get('rope_type')!r} (known: {', '.join(_KNOWN)})")
    return found


def rotary_remarks(content: dict[str, Any], config) -> list[str]:
    """Where config.json says twice, and differently, how positions turn: which of it transformers takes."""
    said = {f"{key}.{name}": value for key in ("rope_parameters", "rope_scaling")
            for name, value in (content.get(key) or {}).items()} | {"rope_theta": content.get("rope_theta")}
    taken = config.rope_parameters or {}
    passed_over = [f"{key}={value}" for key, value in said.items()
                   if value is not None and taken.get(key.rpartition(".")[2]) != value and not key.endswith(".type")]
    used = ", ".join(f"{name}={value}" for name, value in taken.items())
    return [f"config.json describes rotary embeddings twice; as in transformers, {used} is taken, not "
            f"{', '.join(passed_over)}"] if passed_over else []


def rotary_parameters(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The way back."""
    return {"rope_type": "default", "rope_theta": theta, **(scaling.given if scaling is not None else {})}


def _both(config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of global layers and of those with a window."""
    return config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]


def read_both(config) -> dict[str, Any]:
    """`ModelConfig`'s keys of rotary embeddings and of windows."""
    (whole, local), windows = _both(config), read_windows(config)
    if windows and local["rope_type"] == "default":  # else stretched as the others are
        windows["local_rope_theta"] = float(local["rope_theta"])
    return {**read_rotary(whole, config), **windows}


def refused_both(config) -> list[str]:
    """What of them the trunk does not compute."""
    whole, local = _both(config)
    found = []
    if local["rope_type"] != "default" and local != whole:
        found.append(f"rope_parameters.sliding_attention with rope_type={local['rope_type']!r} (layers with a window "
                     "are stretched as the others are, or not at all)")
    return found + [line for one in ([whole] if whole == local else [whole, local])
                    for line in refused_rotary(one, config)]


def remarks_of_both(content: dict[str, Any], config, keys: tuple[str, str]) -> list[str]:
    """Where config.json has bases under `keys`, too, and others."""
    bases = zip(keys, (one["rope_theta"] for one in _both(config)), strict=True)
    return [f"config.json describes rotary embeddings twice; as in transformers, rope_parameters is taken, not "
            f"{key}={content[key]}" for key, theta in bases if content.get(key) not in (None, theta)]


def both_parameters(model: ModelConfig) -> dict[str, Any]:
    """The way back."""
    local = model.rope.of_windows
    return {"full_attention": rotary_parameters(model.rope_theta, model.rope_scaling),
            "sliding_attention": rotary_parameters(local.theta, local.scaling)}
