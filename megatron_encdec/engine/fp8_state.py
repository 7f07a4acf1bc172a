"""The state of FP8 in a checkpoint: scales and histories of largest values, as plain tensors.

Transformer Engine keeps them in each layer's `fp8_meta` and saves them as a pickle, which a checkpoint of ours never
holds: reading it would run what it names. Only the `delayed` recipe has state; the others look at each tensor anew.
Attention has an `fp8_meta` too, though its products stay in bf16: linear layers are those with a weight.

    1. `make_fp8_state(trunk)`    allocate it before the first step, so that it can be loaded and saved from the start
    2. `fp8_state(trunk)`         the live tensors by name: fp8.LAYER.MODULE.scaling_fwd|scaling_bwd.scale|amax_history

Largest values are reduced over tensor- and data-parallel ranks, so these hold the same numbers on any topology.
"""

import torch

from megatron_encdec.platform import megatron as mcore

PREFIX = "fp8"
_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_TENSORS = ("scale", "amax_history")


def make_fp8_state(trunk) -> None:
    """Give every FP8 layer its scales (1) and histories (0); nothing for recipes without state."""
    if trunk.config.fp8 is None or trunk.config.fp8_recipe != "delayed":
        return
    recipe = mcore.fp8_recipe(trunk.config)
    for module in trunk.decoder.modules():
        if hasattr(module, "init_fp8_meta_tensors") and hasattr(module, "weight"):
            module.fp8_meta["num_gemms"] = 1  # linear layers: one product each
            module.fp8_meta["recipe"] = recipe
            module.init_fp8_meta_tensors(recipe)


def fp8_state(trunk) -> dict[str, torch.Tensor]:
    """Live tensors by their names in a checkpoint; layers are numbered over the whole trunk, from 0."""
    found = {}
    for layer in getattr(getattr(trunk, "decoder", None), "layers", ()):
        for name, module in layer.named_modules():
            meta = (getattr(module, "fp8_meta", None) or {}) if hasattr(module, "weight") else {}
            for direction in _DIRECTIONS:
                for part in _TENSORS:
                    value = getattr(meta.get(direction), part, None)
                    if isinstance(value, torch.Tensor):
                        found[f"{PREFIX}.{layer.layer_number - 1}.{name}.{direction}.{part}"] = value
    return found
