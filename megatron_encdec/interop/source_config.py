"""A Hugging Face config.json as a trunk's shape; what the trunk would not do is refused by the name of its key.

    1. `read_source(directory)`     target, `ModelConfig`, remarks  ->  `SourceModel`
    2. refused                      architectures without a table; features that would be dropped; unknown keys

Unknown keys are refused, not skipped: in this format a key is often all that tells one architecture from another
(logit soft-capping, multipliers, experts). `--ignore KEY` is the way past one that is known to mean nothing.
Defaults are transformers' own for the class: a saved config may leave them out.
"""

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_encdec.interop.families import MODEL_FAMILIES
from megatron_encdec.interop.families.family import Family, Target
from megatron_encdec.interop.source_files import read_object
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.platform.errors import UserError

# Keys that change nothing in a forward pass, of whatever version wrote them, or that are read in any family.
_COSMETIC = {
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "auto_map", "is_llama_config",
    "transformers.js_config", "use_cache", "pretraining_tp", "initializer_range", "classifier_pooling", "clf_pooling",
    "classifier_dropout", "num_labels", "id2label", "label2id", "problem_type", "is_causal", "is_decoder",
    "unsloth_fixed", "unsloth_version", "rope_theta", "rope_scaling", "rope_parameters", "chunk_size_feed_forward",
    "output_attentions", "output_hidden_states", "return_dict", "finetuning_task", "task_specific_params",
    "name_or_path", "max_window_layers", "sep_token_id", "decoder_start_token_id", "attention_dropout", "layer_types",
    "no_rope_layer_interval", "head_dim", "transformers_weights", "configuration_files"}
_DROPOUTS = ("attention_dropout", "embedding_dropout", "mlp_dropout", "resid_pdrop", "embd_pdrop")
_MEANT_BY = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok",
                     "moe_intermediate_size"), "mixture of experts"),
    "final_logit_softcapping": "logit soft-capping", "attn_logit_softcapping": "logit soft-capping",
    "logit_softcapping": "logit soft-capping", "router_logits_soft_cap": "logit soft-capping",
    "logit_scale": "scaled logits", "logits_scaling": "scaled logits", "embedding_multiplier": "scaled embeddings",
    "scale_emb": "scaled embeddings", "residual_multiplier": "scaled residuals", "scale_depth": "scaled residuals",
    "attention_multiplier": "another attention scale", "query_pre_attn_scalar": "another attention scale",
    "clip_qkv": "clipped queries, keys and values", "use_qk_norm": "norms on queries and keys",
    "parallel_attn": "attention beside the MLP", "use_parallel_residual": "attention beside the MLP",
    "rope_interleaved": "rotary embeddings of neighbouring pairs", "alibi": "ALiBi positions",
    "sliding_window": "a sliding window",
    "attention_chunk_size": "chunked attention"}


@dataclass(frozen=True)
class SourceModel:
    """A released model, understood."""

    target: Target
    architecture: str  # the class that wrote it
    model: ModelConfig
    content: dict[str, Any]  # its config.json
    config: Any  # the same as an instance of transformers' class
    remarks: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether nothing of a language model is missing: of one whose head is the embeddings, the body is all."""
        body = self.architecture.endswith("Model") and self.model.head_is_embeddings
        return body or self.architecture == self.target.model_class


def read_source(directory: Path, ignore: Collection[str] = ()) -> SourceModel:
    """What `directory` holds, by its config.json. Raises `UserError` naming what cannot be taken over."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    content = _read(path, ignore)
    family, architecture = _family(path, content)
    config = _hugging_face(path, family, content)
    pad, rows = config.pad_token_id, config.vocab_size
    if isinstance(pad, int) and not -rows <= pad < rows:
        raise UserError(f"{path}: pad_token_id={pad} is not among the {rows} tokens of vocab_size, and transformers "
                        "cannot load such a model; set it to null or to a token's id")
    refusals = [*family.refused(config), *_unknown(content, config, {*ignore, *family.cosmetic})]
    if family.attentions == ("bidirectional",) and getattr(config, "is_causal", None) is True:
        refusals.append("is_causal=true (transformers' attention paths disagree on that in an encoder's class)")
    if refusals:
        raise UserError(f"{path}: {architecture} with {'; '.join(refusals)}: the trunk does not do that, and "
                        "leaving it out would make another model")
    remarks = []
    if content.get("auto_map"):
        remarks.append("auto_map names code that came with the model; none of it is run, the weights are taken for "
                       f"transformers' own {architecture}")
    remarks += [f"{key} {value} is not used: the trunk trains without dropout" for key in _DROPOUTS
                if (value := getattr(config, key, 0.0))]
    remarks += family.remarks(content, config)
    target = Target(family, family.attention_of(config))
    return SourceModel(target, architecture, _model(path, family, config), content, config, remarks)


def _read(path: Path, ignore: Collection[str]) -> dict[str, Any]:
    """config.json, where it is what transformers would read."""
    content, adapter = read_object(path), read_object(path.parent / "adapter_config.json")
    if not path.is_file() and adapter:
        base = adapter.get("base_model_name_or_path")
        raise UserError(f"{path.parent}: holds an adapter alone, for {base}; load both "
                        "with peft, merge_and_unload(), save_pretrained(), and import that")
    if not path.is_file():
        below = sorted(path.parent.glob("*/config.json"))
        elsewhere = f"; there is one in {below[0].parent}" if below else ""
        raise UserError(f"{path.parent}: not a Hugging Face model directory (it has no config.json){elsewhere}")
    if content.get("configuration_files") and "configuration_files" not in ignore:
        from transformers.configuration_utils import get_configuration_file

        chosen = get_configuration_file(content["configuration_files"])
        if chosen != path.name:
            raise UserError(f"{path}: configuration_files: transformers reads {chosen} in its place; copy that file "
                            "over it, or read this one with --ignore configuration_files")
    if quantised := content.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{path}: quantization_config: quantised weights ({method}); import the model that they were "
                        "made from, or load them with transformers, dequantize(), save_pretrained(), and import that")
    return content


_OTHER_TRUNKS = {  # model_type -> why it is not one of the families; the rest has no line of its own
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "nomic_bert"),
                    "positions from a table, a norm behind each sum and biases everywhere are another trunk; as a "
                    "baseline, finetune and evaluate take it as it is"),
    **dict.fromkeys(("deberta", "deberta-v2"), "its attention adds terms for relative positions, which is another "
                    "trunk; as a baseline, finetune and evaluate take it as it is"),
    **dict.fromkeys(("gemma3", "llama4", "mistral3"), "a model of images and text; save its language model alone with "
                    "transformers, and import that"),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "olmoe", "phimoe"), "mixture of experts"),
    **dict.fromkeys(("t5", "bart", "mt5"), "an encoder and a decoder that reads it are two trunks")}


def _family(path: Path, content: dict) -> tuple[Family, str]:
    """The family, and the class that wrote the config."""
    kind, named = content.get("model_type"), content.get("architectures") or []
    if not named and kind in MODEL_FAMILIES:
        return MODEL_FAMILIES[kind], MODEL_FAMILIES[kind].model_class
    for family in MODEL_FAMILIES.values():
        if len(named) == 1 and family.is_of(named[0]):
            if "model_type" in content and kind != family.name:
                raise UserError(f"{path}: architectures says {named[0]}, model_type says {kind!r}: one of them is "
                                "wrong")
            return family, named[0]
    known = ", ".join(family.model_class for family in MODEL_FAMILIES.values())
    about = f"{path}: architecture {', '.join(map(str, named)) or 'not named'} (model_type {kind!r})"
    if content.get("auto_map"):
        raise UserError(f"{about} is code that comes with the model (auto_map), which is never run; known are "
                        f"transformers' own {known}, and their headless classes: import a model saved as one of them")
    if reason := _OTHER_TRUNKS.get(kind):
        raise UserError(f"{about} is not supported: {reason}")
    raise UserError(f"{about} is not supported; known are {known}, and their headless classes")


def _hugging_face(path: Path, family: Family, content: dict):
    """The config as transformers reads it, its defaults filled in; no code of the directory is run."""
    import transformers

    try:
        return getattr(transformers, family.config_class).from_dict(copy.deepcopy(content))  # it edits what it reads
    except Exception as error:  # its checks raise what they like
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: transformers refuses it: {reason}") from None


def _unknown(content: dict, config, ignore: Collection[str]) -> list[str]:
    """Keys that say something and that neither the family's config nor this module knows."""
    import transformers

    read = set(vars(type(config)())) | set(transformers.GenerationConfig().to_dict()) | _COSMETIC | set(ignore)
    found = []
    for key, value in content.items():
        known = key in read or key.startswith("_") or key.endswith(("_token", "_token_id"))
        if known or value in (None, False, 0, "", [], {}):
            continue
        meant = _MEANT_BY.get(key, f"a key this family does not have; --ignore {key} if it changes nothing")
        found.append(f"{key}={json.dumps(value)[:60]} ({meant})")
    return found


def _model(path: Path, family: Family, config) -> ModelConfig:
    try:
        return ModelConfig(**family.read(config), family=family.name, max_positions=config.max_position_embeddings)
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
