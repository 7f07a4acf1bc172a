"""Sliding windows of some layers: `layer_types` and what goes with it in the configs that have it."""

from typing import Any

from megatron_encdec.model.config import ModelConfig


def read_windows(config) -> dict[str, Any]:
    """`ModelConfig`'s keys of sliding windows."""
    without = [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]
    if config.sliding_window is None or len(without) == config.num_hidden_layers:
        return {}
    return {"sliding_window": config.sliding_window, "layers_without_window": without}


def layer_types(model: ModelConfig) -> list[str]:
    """Of every layer."""
    bounded = model.layers_with_window
    return ["sliding_attention" if layer in bounded else "full_attention" for layer in range(model.num_layers)]


def windows_by_layer(model: ModelConfig) -> dict[str, Any]:
    """The way back; a width alone where there is one, since configs have a default that must not be null."""
    width = {"sliding_window": model.sliding_window} if model.sliding_window else {}
    return {**width, "layer_types": layer_types(model)}


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The same for configs that also say `use_sliding_window`."""
    if not model.layers_with_window:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, **windows_by_layer(model)}
