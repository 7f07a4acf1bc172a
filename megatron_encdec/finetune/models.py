"""An exported encoder with the head of its family; its attention is bidirectional, whatever objective it ended with.

EuroBERT has the layers of a Llama and no causal mask, and both name their weights alike (a CLM phase exports as Llama,
an MLM phase as EuroBERT): every run is a stock EuroBERT class, so what is saved loads with the Auto classes.

    SC   EuroBertForSequenceClassification, mean pooling      TC   EuroBertForTokenClassification
    QA   the same with two labels, start and end              IR   EuroBertModel, pooled by mean (sentence-transformers)
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import transformers

from megatron_encdec.interop.source_files import TensorFiles
from megatron_encdec.platform.errors import UserError

_CLASSES = {"SC": "EuroBertForSequenceClassification", "TC": "EuroBertForTokenClassification",
            "QA": "EuroBertForTokenClassification", "IR": "EuroBertModel"}
_SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
           "attention_bias", "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters", "head_dim")


def encoder_config(path: str | Path) -> transformers.EuroBertConfig:
    """The config of the model in `path` as EuroBERT's; `UserError` in one line if its layers are not EuroBERT's."""
    file = Path(path) / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a model's config ({error})") from None
    if kind == "eurobert":
        config = transformers.EuroBertConfig.from_pretrained(path, local_files_only=True)
    elif kind == "llama":
        llama = transformers.LlamaConfig.from_pretrained(path, local_files_only=True)
        if getattr(llama, "mlp_bias", False) or llama.hidden_size != llama.head_dim * llama.num_attention_heads:
            raise UserError(f"{path}: a Llama with mlp_bias, or heads that do not fill the hidden size, cannot be made "
                            "bidirectional as EuroBERT")
        config = transformers.EuroBertConfig(
            **{key: getattr(llama, key) for key in _SHARED if getattr(llama, key, None) is not None})
    else:
        raise UserError(f"{path}: model_type {kind!r} cannot be fine-tuned here: EuroBERT and Llama can (an exported "
                        "encoder; `megatron-encdec export --as eurobert`)")
    config.classifier_pooling, config.tie_word_embeddings = "mean", False
    return config


@lru_cache(maxsize=2)
def _pretrained_weights(path: str, _changed: int) -> dict[str, torch.Tensor]:
    """The encoder's tensors by their names in `EuroBertModel`; kept for the next run in this process."""
    files = TensorFiles(Path(path))
    return {name.removeprefix("model."): files.read(name) for name in files.places
            if not name.startswith(("lm_head.", "classifier.", "dense."))}


def build_model(path: str, family: str, labels: Sequence[str] = (), weights: str = "pretrained"):
    """The model of `family` with the encoder in `path`, in fp32. `labels`: of SC and TC, in order.

    New weights (heads; everything for `weights` "random") are drawn from torch's generator as it stands. Raises
    `UserError` where the encoder's do not fit its config.
    """
    config = encoder_config(path)
    if family != "IR":
        names = ("start", "end") if family == "QA" else labels
        config.id2label = dict(enumerate(names))
        config.label2id = {label: number for number, label in enumerate(names)}
    config.architectures = [_CLASSES[family]]
    model = getattr(transformers, _CLASSES[family])(config).float()
    if weights == "pretrained":
        changed = max(file.stat().st_mtime_ns for file in Path(path).glob("*")
                      if file.suffix in (".json", ".safetensors"))
        encoder = model if family == "IR" else model.model
        problem = encoder.load_state_dict(_pretrained_weights(path, changed), strict=False)
        if problem.missing_keys or problem.unexpected_keys:
            raise UserError(f"{path}: its weights are not those of its config (missing {problem.missing_keys[:3]}, "
                            f"unexpected {problem.unexpected_keys[:3]})")
    return model


def mean_pool(hidden_BSH: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """[B, H]: the mean over tokens whose mask is 1 (B texts, S tokens, H hidden)."""
    mask_BS1 = mask_BS.unsqueeze(-1).to(hidden_BSH.dtype)
    return (hidden_BSH * mask_BS1).sum(1) / mask_BS1.sum(1)
