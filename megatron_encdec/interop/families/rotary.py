"""Rotary embeddings in configs: `rope_parameters` of one kind of layer, and what of them the trunk computes."""

from typing import Any

from megatron_encdec.model.rope import RopeScaling
from megatron_encdec.platform import schema

_KNOWN = ("default", "linear", "llama3", "yarn")


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
