"""Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786), EmbeddingGemma (arXiv 2509.20354) with
them: zero-centred norms before and after attention and MLP, GeGLU with tanh, scaled embeddings.

A Gemma 3 that sees to both sides says `use_bidirectional_attention`; its `sliding_window` is 2 w then, for the trunk's
w: it sees |i - j| <= w, and 0 <= i - j < w as a decoder (transformers 5.18). What takes images is another class.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_encdec.interop.families.family import HEADLESS
from megatron_encdec.interop.families.features import MAY
from megatron_encdec.interop.families.llama_shaped import LlamaShaped
from megatron_encdec.interop.families.windows import read_windows, windows_by_layer
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives.base import AttentionKind

_ALWAYS = {"norm_place": "both", "norm_zero_centered": True, "activation": "geglu_tanh",
           "embedding_multiplier": lambda model: math.sqrt(model.hidden_size),
           **dict.fromkeys(("attention_multiplier", "logits_softcap", "sliding_window", "layers_without_window"), MAY)}


@dataclass(frozen=True)
class _Gemma(LlamaShaped):
    # older spellings, which transformers reads or passes over
    cosmetic: ClassVar[frozenset[str]] = frozenset({"hidden_act", "sliding_window_pattern", "rope_local_base_freq"})

    def read(self, config) -> dict[str, Any]:
        scalar = config.query_pre_attn_scalar
        if scalar <= 0:
            raise ValueError(f"query_pre_attn_scalar: {scalar} is not above 0")
        return {**super().read(config), **read_windows(config), "embedding_multiplier": math.sqrt(config.hidden_size),
                "attention_multiplier": None if scalar == config.head_dim else scalar**-0.5,
                "logits_softcap": config.final_logit_softcapping}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {**super().write(model), **windows_by_layer(model),
                "query_pre_attn_scalar": _scalar(model), "final_logit_softcapping": model.logits_softcap}

    def refuses(self, model: ModelConfig) -> str | None:
        scale = model.attention_multiplier
        if scale is not None and _scalar(model) ** -0.5 != scale:
            return f"its scores are divided by the root of a whole number; here model.attention_multiplier={scale}"
        return super().refuses(model)


@dataclass(frozen=True)
class _Gemma2(_Gemma):
    eager: ClassVar[bool] = True  # SDPA leaves out the bound on the scores

    def read(self, config) -> dict[str, Any]:
        return {**super().read(config), "attention_softcap": config.attn_logit_softcapping}

    def refused(self, config) -> list[str]:
        return super().refused(config) + (["use_bidirectional_attention=true (transformers' attention paths disagree "
                                           "on that)"] if config.use_bidirectional_attention else [])

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {**super().write(model), "attn_logit_softcapping": model.attention_softcap}


@dataclass(frozen=True)
class _Gemma3(_Gemma):
    def read(self, config) -> dict[str, Any]:
        found = super().read(config)
        if found.get("sliding_window") and config.use_bidirectional_attention:
            found["sliding_window"] -= 1  # of W it makes W / 2 + 1, the first distance beyond the window
        return found

    def refused(self, config) -> list[str]:
        found = super().refused(config)
        if getattr(config, "is_causal", True) is False:
            found.append("is_causal=false (a Gemma 3 that sees to both sides says use_bidirectional_attention)")
        if config.use_bidirectional_attention and "sliding_attention" in config.layer_types and (
                config.sliding_window < 2):
            found.append("sliding_window below 2 with use_bidirectional_attention (windows of less than a token)")
        if config.attn_logit_softcapping is not None:
            found.append(f"attn_logit_softcapping={config.attn_logit_softcapping} (transformers' Gemma 3 has the key "
                         "and does not use it)")
        return found

    def attention_of(self, config) -> AttentionKind:
        return "bidirectional" if config.use_bidirectional_attention else "causal"

    def turned(self, model: ModelConfig) -> dict[str, Any]:
        windows = {"sliding_window": 2 * model.sliding_window} if model.sliding_window else {}
        return {"use_bidirectional_attention": True, **windows}

    def is_of(self, architecture: str) -> bool:
        return architecture in (self.model_class, *("Gemma3Text" + ending for ending in HEADLESS))


def _scalar(model: ModelConfig) -> int:
    """`query_pre_attn_scalar`: one over the square of the scores' multiplier."""
    return model.head_dim if model.attention_multiplier is None else round(model.attention_multiplier**-2)


_TANH = ("hidden_activation", ("gelu_pytorch_tanh",))
GEMMA2 = _Gemma2("gemma2", "Gemma2Config", "Gemma2ForCausalLM", whole_heads=True, biases=True, activation=_TANH,
                 features={**_ALWAYS, "attention_softcap": MAY})
GEMMA3 = _Gemma3("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM", whole_heads=True, biases=True,
                 activation=_TANH, two_rotaries=True,
                 features={**_ALWAYS, "qk_norm": True, "local_rope_theta": MAY})
