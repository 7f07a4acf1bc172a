"""OLMo 2 (arXiv 2501.00656) and OLMo 3: norms after attention and MLP, and over all heads of queries and of keys."""

from dataclasses import dataclass
from typing import Any

from megatron_encdec.interop.families.features import MAY
from megatron_encdec.interop.families.llama_shaped import LlamaShaped
from megatron_encdec.interop.families.windows import windows_by_layer
from megatron_encdec.model.config import ModelConfig

_ALWAYS = {"norm_place": "after", "qk_norm": True, "qk_norm_over": "heads"}


@dataclass(frozen=True)
class _Olmo3(LlamaShaped):
    """With windows in some layers."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {**super().write(model), **windows_by_layer(model)}


OLMO2 = LlamaShaped("olmo2", "Olmo2Config", "Olmo2ForCausalLM", biases=True, features=_ALWAYS)
OLMO3 = _Olmo3("olmo3", "Olmo3Config", "Olmo3ForCausalLM", biases=True, two_rotaries=True, features={
    **_ALWAYS, **dict.fromkeys(("sliding_window", "layers_without_window", "local_rope_theta"), MAY)})
