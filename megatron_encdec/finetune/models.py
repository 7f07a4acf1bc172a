"""Any encoder that `AutoModel` loads without code of its own, with the head of its family.

    SC   pooling, then EuroBERT's head (dense, GELU, classifier), or the stock class where that pools as asked for
    TC   the stock class for tokens          QA   the same with two labels, start and end
    IR   the encoder alone, pooled

    1. `encoder_config(source)`     its config, with the attention that is asked for
    2. `build_model(source, ...)`   the model; `check_attention` proves what it sees
    3. `save_model(...)`            a directory for the Auto class or, where no stock class has such a head
                                    (`HeadedEncoder`), for sentence-transformers

Legend of shapes: B texts, S tokens, H hidden size, C classes.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from megatron_encdec.finetune.config import ModelSource
from megatron_encdec.interop.hugging_face import quiet, write_pooling
from megatron_encdec.platform.errors import UserError

_STOCK = {"SC": transformers.AutoModelForSequenceClassification, "TC": transformers.AutoModelForTokenClassification,
          "QA": transformers.AutoModelForTokenClassification}
_HEADS = {"SC": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
          "TC": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
          "QA": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING}
_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")
_UNLIMITED = 2**20  # positions of a model that has no table of them


def encoder_config(source: ModelSource) -> transformers.PretrainedConfig:
    """The config of the model, with its attention and pooling; `UserError` in one line if it is no text encoder."""
    try:
        config = transformers.AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read as a model's config "
                        f"({str(error).splitlines()[0]})") from None
    except (ValueError, KeyError):
        raise UserError(f"{source.path}: its model_type is none of transformers {transformers.__version__}; code that "
                        "comes with a model is never run") from None
    if (config.is_encoder_decoder or not hasattr(config, "vocab_size")
            or type(config) not in transformers.MODEL_MAPPING):
        raise UserError(f"{source.path}: model_type {config.model_type!r} cannot be fine-tuned here: not one stack of "
                        "layers over text")
    if _is_decoder(config):
        # nothing between the layers and the head drops out, as in EuroBERT; keys and values serve generation alone
        config.classifier_dropout, config.use_cache = 0.0, False
        if source.attention == "causal" or not getattr(config, "use_bidirectional_attention", False):
            config.is_causal = source.attention == "causal"  # besides Gemma 3's own key it would move windows by one
    if hasattr(config, "classifier_pooling") and source.pooling != "last":
        first = "bos" if config.model_type == "eurobert" else "cls"
        config.classifier_pooling = first if source.pooling == "cls" else "mean"
    return config


def _is_decoder(config) -> bool:
    return (type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING)


def positions_of(source: ModelSource) -> int:
    """How many tokens a text of the model can have."""
    config = encoder_config(source)
    positions = getattr(config, "max_position_embeddings", _UNLIMITED)
    return positions - (config.pad_token_id + 1 if config.model_type in _AFTER_PADDING else 0)


def _has_stock_head(config, family: str, pooling: str) -> bool:
    """Whether a class of transformers has the head: of SC, one that pools so."""
    if type(config) not in _HEADS[family]:
        return False
    if family != "SC":
        return True
    if hasattr(config, "classifier_pooling"):
        return pooling in ("mean", "cls")
    return pooling == ("last" if _is_decoder(config) else "cls")


@lru_cache(maxsize=2)
def _pretrained_weights(path: str, _changed: int) -> dict[str, torch.Tensor]:
    """The encoder's tensors, in fp32, by their names in `AutoModel`; kept for the next run in this process."""
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # weights that are not there are drawn, and not used
            model, found = transformers.AutoModel.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its weights are not those of its config ({str(error).splitlines()[0]})") from None
    parts = {name for name, _ in model.named_children()}
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    unexpected = sorted(name for name in found["unexpected_keys"] if name.endswith((".weight", ".bias"))
                        and name.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in parts)
    if missing or unexpected:
        raise UserError(f"{path}: its weights are not those of its config (missing {missing[:3]}, "
                        f"unexpected {unexpected[:3]})")
    return {name: tensor for name, tensor in model.state_dict().items() if name not in found["missing_keys"]}


class HeadedEncoder(transformers.PreTrainedModel):
    """An encoder with a head that no stock class of its architecture has: EuroBERT's behind `pooling`, or, without
    one, a layer over each token."""

    base_model_prefix = "encoder"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True  # as `encoder`

    def __init__(self, encoder: transformers.PreTrainedModel, pooling: str | None):
        super().__init__(encoder.config)
        size = encoder.config.hidden_size
        self.encoder, self.pooling = encoder, pooling
        self.layers = nn.ModuleList([nn.Linear(size, size)] if pooling else [])
        self.layers.append(nn.Linear(size, encoder.config.num_labels))
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """Logits [B, C], or [B, S, C] without pooling."""
        values = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling is not None:
            values = pool(values, attention_mask, self.pooling)
        for layer in self.layers[:-1]:
            values = nn.functional.gelu(layer(values))
        return SequenceClassifierOutput(logits=self.layers[-1](values))


def build_model(source: ModelSource, family: str, labels: Sequence[str] = (), pad: int | None = None,
                problem: str | None = None):
    """The model of `family` with the encoder of `source`, in fp32. `labels`: of SC and TC, in order (none: one number);
    `pad`: the tokenizer's token of padding; `problem`: of SC, as transformers calls it.

    New weights (heads; everything for weights "random") are drawn from torch's generator as it stands. Raises
    `UserError` where the encoder's do not fit its config.
    """
    config = encoder_config(source)
    if pad is not None and (config.pad_token_id is None or source.pooling == "last"):
        config.pad_token_id = pad  # by which the stock classes find a text's last token
    if family != "IR":
        names = ("start", "end") if family == "QA" else labels or ("score",)
        config.id2label = dict(enumerate(names))
        config.label2id = {label: number for number, label in enumerate(names)}
        config.problem_type = problem
    options = {"dtype": torch.float32, "trust_remote_code": False}
    if family != "IR" and _has_stock_head(config, family, source.pooling):
        model = _STOCK[family].from_config(config, **options)
    else:
        model = transformers.AutoModel.from_config(config, **options)
        if getattr(model, "pooler", None) is not None:  # BERT's: kept, and not used
            model.pooler.requires_grad_(False)
        if family != "IR":
            model = HeadedEncoder(model, source.pooling if family == "SC" else None)
    if source.weights == "pretrained":
        changed = max(file.stat().st_mtime_ns for file in Path(source.path).iterdir())
        model.base_model.load_state_dict(_pretrained_weights(source.path, changed), strict=False)
    return model


@torch.no_grad()
def check_attention(model: transformers.PreTrainedModel, source: ModelSource) -> None:
    """`UserError` unless later tokens move earlier positions where `source.attention` is bidirectional, and do not
    where it is causal; on the attention implementation in use, with padding and without."""
    config, encoder, training = model.config, model.base_model, model.training
    pad = config.pad_token_id or 0
    first, *later = [token for token in range(config.vocab_size) if token != pad][:3]
    encoder.eval()
    for padding in (0, 2):
        mask = torch.tensor([[1] * 8 + [0] * padding], device=encoder.device)
        texts = [torch.tensor([[first] * 4 + [token] * 4 + [pad] * padding], device=encoder.device)
                 for token in later]
        try:
            before, after = (encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0, :4].float()
                             for ids in texts)
        except TypeError as error:  # ModernBERT's decoder under eager attention without padding
            raise UserError(f"{source.path}: attention: {source.attention} is asked for, and {type(encoder).__name__} "
                            f"fails under it with {config._attn_implementation} attention ({error}); export the run as "
                            "an encoder's class") from None
        found = "causal" if (before - after).abs().max() <= 1e-6 * before.abs().max() else "bidirectional"
        if found != source.attention:
            raise UserError(f"{source.path}: attention: {source.attention} is asked for, but {type(encoder).__name__} "
                            f"is {found} (by a probe of {config._attn_implementation} attention "
                            f"{'with' if padding else 'without'} padding)")
    encoder.train(training)


def save_model(model: transformers.PreTrainedModel, directory: Path, source: ModelSource, family: str,
               max_length: int) -> None:
    """A directory for the Auto class; of a retriever, and where no stock class has the head, for sentence-transformers,
    whose embeddings then are the logits (token embeddings, of TC and QA)."""
    headed = isinstance(model, HeadedEncoder)
    (model.base_model if headed else model).save_pretrained(directory)
    if headed or family == "IR":
        pooling = source.pooling if family in ("SC", "IR") else None
        write_pooling(directory, model.config.hidden_size, max_length, pooling, model.layers if headed else ())


def pool(hidden_BSH: torch.Tensor, mask_BS: torch.Tensor, how: str) -> torch.Tensor:
    """[B, H]: the mean over tokens whose mask is 1, the first of them (`cls`) or the last; padding is on the right."""
    if how == "cls":
        return hidden_BSH[:, 0]
    if how == "last":
        last_B11 = (mask_BS.sum(1) - 1).view(-1, 1, 1)  # gathered, so that no size of a batch is in an exported graph
        return hidden_BSH.gather(1, last_B11.expand(-1, 1, hidden_BSH.size(-1))).squeeze(1)
    mask_BS1 = mask_BS.unsqueeze(-1).to(hidden_BSH.dtype)
    return (hidden_BSH * mask_BS1).sum(1) / mask_BS1.sum(1)
