"""ModernBERT (arXiv 2412.13663), encoder and decoder: one shape, two classes (Ettin, arXiv 2507.11412; mmBERT).

The encoder has one tensor for queries, keys and values, the decoder three. `local_attention` is 2 w on both ends: the
encoder sees |i - j| <= w, the decoder 0 <= i - j < w (transformers 5.18), as the trunk's `sliding_window` = w does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_encdec.interop.families.family import Family
from megatron_encdec.interop.families.features import MAY, fixed, misfit
from megatron_encdec.interop.families.rotary import (
    MODERNBERT_KEYS,
    both_parameters,
    read_both,
    refused_both,
    remarks_of_both,
)
from megatron_encdec.interop.families.windows import layer_types
from megatron_encdec.interop.names import EMBEDDINGS, HEAD, QKV, VOCABULARY, WHOLE_QKV, Row
from megatron_encdec.model.config import ModelConfig

_OURS, _THEIRS = "decoder.layers.{}.", "model.layers.{}."
_CONFIG_KEYS = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
                "num_attention_heads": "num_attention_heads", "tied_embeddings": "tie_word_embeddings",
                "norm_eps": "norm_eps", "init_std": "initializer_range", "vocabulary_size": "vocab_size"}
_FEATURES = {"norm": "layernorm", "activation": "geglu", "embedding_norm": True, "prediction_head": "dense",
             **dict.fromkeys(("sliding_window", "layers_without_window", "local_rope_theta"), MAY)}
# keys of configs -> the one value that the trunk computes, and what another would be
_FIXED = {"attention_bias": (False, "biases in the attention"), "mlp_bias": (False, "biases in the MLP"),
          "norm_bias": (False, "biases in the norms"), "classifier_bias": (False, "a bias in the head's dense layer"),
          "decoder_bias": (True, "no bias behind the output matrix"),
          "hidden_activation": ("gelu", "another activation"),
          "classifier_activation": ("gelu", "another activation in the head")}


def _rows(qkv: Row, head: str) -> tuple[Row, ...]:
    """The name table. head: what the class calls the dense layer and the norm before the output matrix."""
    norm = _OURS + "self_attention.linear_qkv.layer_norm_weight"  # of the first layer: the embeddings'
    return (
        Row(EMBEDDINGS, ("model.embeddings.tok_embeddings.weight",), ("VH",), VOCABULARY),
        Row(norm.format(0), ("model.embeddings.norm.weight",), ("H",)),
        Row(norm, (_THEIRS + "attn_norm.weight",), ("H",), first=1),
        qkv,
        Row(_OURS + "self_attention.linear_proj.weight", (_THEIRS + "attn.Wo.weight",), ("HQ",)),
        Row(_OURS + "mlp.linear_fc1.layer_norm_weight", (_THEIRS + "mlp_norm.weight",), ("H",)),
        Row(_OURS + "mlp.linear_fc1.weight", (_THEIRS + "mlp.Wi.weight",), ("WH",)),
        Row(_OURS + "mlp.linear_fc2.weight", (_THEIRS + "mlp.Wo.weight",), ("HF",)),
        Row("decoder.final_layernorm.weight", ("model.final_norm.weight",), ("H",)),
        Row("prediction_head.dense.weight", (f"{head}.dense.weight",), ("HH",), head=True),
        Row("prediction_head.norm.weight", (f"{head}.norm.weight",), ("H",), head=True),
        Row("output_layer.bias", ("decoder.bias",), ("V",), VOCABULARY, head=True),
        Row(HEAD, ("decoder.weight",), ("VH",), VOCABULARY, present=lambda model: not model.tied_embeddings,
            head=True))


@dataclass(frozen=True)
class _ModernBert(Family):
    rows: ClassVar[tuple[Row, ...]] = _rows(
        Row(_OURS + "self_attention.linear_qkv.weight", (_THEIRS + "attn.Wqkv.weight",), ("PH",), WHOLE_QKV), "head")
    cosmetic: ClassVar[frozenset[str]] = frozenset({
        "position_embedding_type", "layer_norm_eps", "gradient_checkpointing", "reference_compile",
        "repad_logits_with_grad", "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index",
        "initializer_cutoff_factor", "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta",
        "sliding_window"})

    def read(self, config) -> dict[str, Any]:
        return {**{ours: getattr(config, theirs) for ours, theirs in _CONFIG_KEYS.items()},
                "num_query_groups": config.num_attention_heads, **read_both(config), **fixed(_FEATURES)}

    def refused(self, config) -> list[str]:
        found = [f"{key}={getattr(config, key)!r} ({meaning})" for key, (value, meaning) in _FIXED.items()
                 if getattr(config, key) != value]
        if self.attentions == ("causal",) and getattr(config, "is_causal", True) is False:
            found.append("is_causal=false (transformers' eager attention fails on it; a bidirectional ModernBERT is a "
                         "ModernBertForMaskedLM)")
        if strange := set(config.layer_types) - {"full_attention", "sliding_attention"}:
            found.append(f"layer_types {', '.join(sorted(strange))}")
        if "sliding_attention" in config.layer_types and (config.sliding_window or 0) < 1:
            found.append(f"local_attention={config.local_attention} (windows of less than a token)")
        return found + refused_both(config)

    def remarks(self, content: dict[str, Any], config) -> list[str]:
        found = remarks_of_both(content, config, MODERNBERT_KEYS)
        found += [f"{key} in config.json is not read by transformers' ModernBERT, whose rotary embeddings are in "
                  "rope_parameters" for key in ("rope_scaling", "rope_theta") if content.get(key)]
        if content.get("sliding_window") and content.get("local_attention") and (
                content["local_attention"] // 2 != config.sliding_window):
            found.append("config.json says twice how wide windows are; as in transformers, sliding_window="
                         f"{config.sliding_window} is taken, not local_attention={content['local_attention']}")
        every = content.get("global_attn_every_n_layers")
        if every and config.layer_types != ["sliding_attention" if layer % every else "full_attention"
                                            for layer in range(config.num_hidden_layers)]:
            found.append("config.json says twice which layers are global; as in transformers, layer_types is taken, "
                         f"not global_attn_every_n_layers={every}")
        return found

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {**{theirs: getattr(model, ours) for ours, theirs in _CONFIG_KEYS.items()},
                **{key: value for key, (value, _) in _FIXED.items()}, "embedding_dropout": 0.0, "mlp_dropout": 0.0,
                "layer_types": layer_types(model), "rope_parameters": both_parameters(model),
                **({"local_attention": 2 * model.sliding_window} if model.sliding_window else {})}

    def ids(self, special: Mapping[str, int | None]) -> dict[str, int | None]:
        """The decoder's config has to have all of them: a token that the tokenizer does not name is another of its."""
        found = {}
        for name, others in {"bos": ("cls", "eos"), "cls": ("bos", "eos"), "sep": ("eos",), "pad": ()}.items():
            known = [special[one] for one in (name, *others) if special.get(one) is not None]
            found[f"{name}_token_id"] = known[0] if known else 0
        return {**super().ids(special), **found}

    def refuses(self, model: ModelConfig) -> str | None:
        if found := misfit(model, _FEATURES):
            return found
        if model.num_query_groups != model.num_attention_heads:
            return (f"it has as many key/value heads as query heads; here model.num_query_groups="
                    f"{model.num_query_groups}, model.num_attention_heads={model.num_attention_heads}")
        if model.head_dim * model.num_attention_heads != model.hidden_size:
            return (f"its heads are as wide as the trunk together; here model.head_dim={model.head_dim}, "
                    f"model.num_attention_heads={model.num_attention_heads}, model.hidden_size={model.hidden_size}")
        return None


@dataclass(frozen=True)
class _ModernBertDecoder(_ModernBert):
    rows: ClassVar[tuple[Row, ...]] = _rows(
        Row(_OURS + "self_attention.linear_qkv.weight", tuple(f"{_THEIRS}attn.{part}_proj.weight" for part in "qkv"),
            ("QH", "KH", "KH"), QKV), "lm_head")


MODERNBERT = _ModernBert("modernbert", "ModernBertConfig", "ModernBertForMaskedLM", attentions=("bidirectional",))
MODERNBERT_DECODER = _ModernBertDecoder("modernbert-decoder", "ModernBertDecoderConfig", "ModernBertDecoderForCausalLM",
                                        attentions=("causal",))
