"""Qwen2, which has biases on queries, keys and values, and Qwen3, which has norms on queries and keys."""

from dataclasses import dataclass
from typing import Any

from megatron_encdec.interop.families.features import MAY
from megatron_encdec.interop.families.llama_shaped import LlamaShaped
from megatron_encdec.interop.families.windows import read_windows, write_windows
from megatron_encdec.model.config import ModelConfig


@dataclass(frozen=True)
class _Qwen(LlamaShaped):
    def read(self, config) -> dict[str, Any]:
        return {**super().read(config), **read_windows(config)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        found, bounded = {**super().write(model), **write_windows(model)}, model.layers_with_window
        if bounded and bounded == list(range(bounded[0], model.num_layers)):
            found["max_window_layers"] = bounded[0]  # the older way to say it: the layers from there on
        return found


_WINDOWS = {"sliding_window": MAY, "layers_without_window": MAY}
QWEN2 = _Qwen("qwen2", "Qwen2Config", "Qwen2ForCausalLM", features={"qkv_bias": True, **_WINDOWS})
QWEN3 = _Qwen("qwen3", "Qwen3Config", "Qwen3ForCausalLM", features={"qk_norm": True, **_WINDOWS},
              biases=True)
