"""SmolLM3: some of its layers turn nothing by position."""

from dataclasses import dataclass
from typing import Any

from megatron_encdec.interop.families.features import MAY
from megatron_encdec.interop.families.llama_shaped import LlamaShaped
from megatron_encdec.interop.families.windows import read_windows, write_windows
from megatron_encdec.model.config import ModelConfig


@dataclass(frozen=True)
class _SmolLM3(LlamaShaped):
    def read(self, config) -> dict[str, Any]:
        return {**super().read(config), **read_windows(config),
                "layers_without_rope": [layer for layer, has in enumerate(config.no_rope_layers or []) if not has]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {**super().write(model), **write_windows(model),
                "no_rope_layers": [int(layer not in model.layers_without_rope) for layer in range(model.num_layers)]}


SMOLLM3 = _SmolLM3(
    "smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", biases=True, settings={"mlp_bias": False},
    features={"layers_without_rope": MAY, "sliding_window": MAY, "layers_without_window": MAY})
