"""Phi-3 (arXiv 2404.14219) and Phi-4: a Mistral with one tensor for queries, keys and values, and one for gate and up.

Those for long texts have `longrope` or turn a part of each head (Phi-4-mini), which is refused.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_encdec.interop.families.features import MAY
from megatron_encdec.interop.families.mistral import MistralShaped
from megatron_encdec.interop.names import ROWS, WHOLE_QKV, Row
from megatron_encdec.model.config import ModelConfig

_OURS, _THEIRS = "decoder.layers.{}.", "model.layers.{}."
_WHOLE = {row.ours: row for row in (
    Row(_OURS + "self_attention.linear_qkv.weight", (_THEIRS + "self_attn.qkv_proj.weight",), ("PH",), WHOLE_QKV),
    Row(_OURS + "mlp.linear_fc1.weight", (_THEIRS + "mlp.gate_up_proj.weight",), ("WH",)))}


@dataclass(frozen=True)
class _Phi3(MistralShaped):
    rows: ClassVar[tuple[Row, ...]] = tuple(_WHOLE.get(row.ours, row) for row in ROWS)

    def refuses(self, model: ModelConfig) -> str | None:
        if model.rope_scaling is not None:
            return f"it has no rotary scaling of type {model.rope_scaling.rope_type} (model.rope_scaling)"
        return super().refuses(model)


PHI3 = _Phi3("phi3", "Phi3Config", "Phi3ForCausalLM", features={"sliding_window": MAY})
