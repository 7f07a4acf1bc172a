"""Mistral: all of its layers have the sliding window, or none."""

from dataclasses import dataclass
from typing import Any

from megatron_encdec.interop.families.features import MAY
from megatron_encdec.interop.families.llama_shaped import LlamaShaped
from megatron_encdec.model.config import ModelConfig


@dataclass(frozen=True)
class MistralShaped(LlamaShaped):
    """A Llama with `sliding_window`."""

    def read(self, config) -> dict[str, Any]:
        return {**super().read(config), "sliding_window": config.sliding_window}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {**super().write(model), "sliding_window": model.sliding_window}


MISTRAL = MistralShaped("mistral", "MistralConfig", "MistralForCausalLM", features={"sliding_window": MAY})
