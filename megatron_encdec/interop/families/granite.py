"""Granite (IBM, dense models): a Llama with factors on embeddings, scores and residuals, and a divisor of logits."""

from dataclasses import dataclass
from typing import Any

from megatron_encdec.interop.families.features import MAY
from megatron_encdec.interop.families.llama_shaped import LlamaShaped
from megatron_encdec.model.config import ModelConfig

_FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")  # 1 where it is not used


@dataclass(frozen=True)
class _Granite(LlamaShaped):
    def read(self, config) -> dict[str, Any]:
        found = super().read(config)
        head_dim = found["head_dim"] or config.hidden_size // config.num_attention_heads
        scale = config.attention_multiplier
        return {**found, "attention_multiplier": None if scale == head_dim**-0.5 else scale,
                **{key: None if getattr(config, key) == 1 else getattr(config, key) for key in _FACTORS}}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scale = model.attention_multiplier
        return {**super().write(model), "attention_multiplier": model.head_dim**-0.5 if scale is None else scale,
                **{key: 1.0 if getattr(model, key) is None else getattr(model, key) for key in _FACTORS}}


GRANITE = _Granite("granite", "GraniteConfig", "GraniteForCausalLM", biases=True, settings={"mlp_bias": False},
                   features=dict.fromkeys((*_FACTORS, "attention_multiplier"), MAY))
