"""The name table: how each tensor of a Hugging Face model comes from the trunk's, and back.

    1. `canonical_weights(trunk)`        the trunk's tensors under their names in a checkpoint
    2. `to_hugging_face(weights, ...)`   trunk tensors -> Hugging Face tensors; `from_hugging_face`: back, where all
                                         are in memory (conversion.py reads them one by one)
    3. `expand(model)`, `check_names`    the rows of one model; what is missing or has no place

Families of a Llama's shape (`families/`) share one table: they differ in which rows are there. Not megatron-bridge's
mappings: it does not import without Transformer Engine, so not without a GPU, and of encoders it maps MegatronBERT
alone (0.7), no EuroBERT.

Legend: A query heads, G query groups (key/value heads), D head dimension, Q = A * D, K = G * D, P = Q + 2 * K, H hidden
size, F feed-forward width, W = 2 * F, V vocabulary. Rotary positions turn halves on both sides, so no row is permuted
for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.platform.errors import UserError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How a trunk tensor holds several of theirs: `split` it into them, `join` them into it."""

    split: Callable[[torch.Tensor, ModelConfig], tuple[torch.Tensor, ...]]
    join: Callable[[tuple[torch.Tensor, ...], ModelConfig], torch.Tensor]


def split_qkv(qkv: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """q [A * D, ...], k [G * D, ...], v [G * D, ...] of a fused [G * (A/G + 2) * D, ...].

    megatron.core lays the rows out group by group: the group's query heads, its key head, its value head.
    """
    rest = qkv.shape[1:]
    rows = qkv.reshape(model.num_query_groups, -1, model.head_dim, *rest)
    return tuple(part.reshape(-1, *rest) for part in (rows[:, :-2], rows[:, -2], rows[:, -1]))


def join_qkv(parts: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    """The inverse of `split_qkv`."""
    rest = parts[0].shape[1:]
    rows = [part.reshape(model.num_query_groups, -1, model.head_dim, *rest) for part in parts]
    return torch.cat(rows, dim=1).reshape(-1, *rest)


SAME = Layout(lambda tensor, _model: (tensor,), lambda parts, _model: parts[0])
QKV = Layout(split_qkv, join_qkv)
WHOLE_QKV = Layout(  # q, k and v, one below the other, in one tensor
    lambda qkv, model: (torch.cat(split_qkv(qkv, model)),),
    lambda parts, model: join_qkv(parts[0].split([model.head_dim * heads for heads in (
        model.num_attention_heads, model.num_query_groups, model.num_query_groups)]), model))
GATE_UP = Layout(lambda fused, _model: fused.chunk(2), lambda parts, _model: torch.cat(parts))
# padded in the trunk with rows that take no part in embedding, softmax or gradient: conversion.py makes them
VOCABULARY = Layout(lambda table, model: (table[: model.vocabulary_size],), SAME.join)


@dataclass(frozen=True)
class Row:
    """A trunk tensor and the Hugging Face tensors that it holds; `{}` in a name is the layer's number, from `first` on.
    head: of the language-model head, which a body saved alone is without."""

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[str, ...]  # of each of `theirs`, in letters of the legend
    layout: Layout = SAME
    present: Callable[[ModelConfig], bool] = lambda model: True  # whether a trunk has it
    first: int = 0
    head: bool = False

    def shapes(self, model: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """Of each of `theirs`."""
        queries, keys = (model.head_dim * heads for heads in (model.num_attention_heads, model.num_query_groups))
        letters = {"D": model.head_dim, "Q": queries, "K": keys, "P": queries + 2 * keys, "H": model.hidden_size,
                   "F": model.ffn_hidden_size, "W": 2 * model.ffn_hidden_size, "V": model.vocabulary_size}
        return tuple(tuple(letters[letter] for letter in size) for size in self.sizes)


_OURS, _THEIRS = "decoder.layers.{}.", "model.layers.{}."
EMBEDDINGS, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def _has_dense_head(model: ModelConfig) -> bool:
    return model.prediction_head == "dense"


def _has_norms_before(model: ModelConfig) -> bool:
    return model.norm_place != "after"


def _has_norms_after(model: ModelConfig) -> bool:
    return model.norm_place != "before"


# Llama's names, which the decoders after it and EuroBERT took over; and all that a trunk can have.
ROWS = (
    Row(EMBEDDINGS, ("model.embed_tokens.weight",), ("VH",), VOCABULARY),
    Row(_OURS + "self_attention.linear_qkv.layer_norm_weight", (_THEIRS + "input_layernorm.weight",), ("H",),
        present=_has_norms_before),
    Row(_OURS + "self_attention.linear_qkv.weight", tuple(f"{_THEIRS}self_attn.{part}_proj.weight" for part in "qkv"),
        ("QH", "KH", "KH"), QKV),
    Row(_OURS + "self_attention.linear_qkv.bias", tuple(f"{_THEIRS}self_attn.{part}_proj.bias" for part in "qkv"),
        ("Q", "K", "K"), QKV, present=lambda model: model.qkv_bias),
    *(Row(f"{_OURS}self_attention.{part}_layernorm.weight", (f"{_THEIRS}self_attn.{part}_norm.weight",), (size,),
          present=lambda model, over=over: model.qk_norm and model.qk_norm_over == over)
      for over, sizes in (("head", "DD"), ("heads", "QK")) for part, size in zip("qk", sizes, strict=True)),
    Row(_OURS + "self_attention.linear_proj.weight", (_THEIRS + "self_attn.o_proj.weight",), ("HQ",)),
    Row(_OURS + "self_attention.linear_proj.bias", (_THEIRS + "self_attn.o_proj.bias",), ("H",),
        present=lambda model: model.attention_output_bias),
    # Gemma and OLMo call a norm after what it follows, Llama the one before the MLP after the attention, too
    Row(_OURS + "self_attn_bda.norm.weight", (_THEIRS + "post_attention_layernorm.weight",), ("H",),
        present=_has_norms_after),
    *(Row(_OURS + "mlp.linear_fc1.layer_norm_weight", (f"{_THEIRS}{name}_layernorm.weight",), ("H",),
          present=lambda model, place=place: model.norm_place == place)
      for place, name in (("before", "post_attention"), ("both", "pre_feedforward"))),
    Row(_OURS + "mlp_bda.norm.weight", (_THEIRS + "post_feedforward_layernorm.weight",), ("H",),
        present=_has_norms_after),
    Row(_OURS + "mlp.linear_fc1.weight", (_THEIRS + "mlp.gate_proj.weight", _THEIRS + "mlp.up_proj.weight"),
        ("FH", "FH"), GATE_UP),
    Row(_OURS + "mlp.linear_fc2.weight", (_THEIRS + "mlp.down_proj.weight",), ("HF",)),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), ("H",)),
    Row("prediction_head.dense.weight", ("lm_head.dense.weight",), ("HH",), present=_has_dense_head, head=True),
    Row("prediction_head.norm.weight", ("lm_head.norm.weight",), ("H",), present=_has_dense_head, head=True),
    Row("output_layer.bias", ("lm_head.bias",), ("V",), VOCABULARY, present=_has_dense_head, head=True),
    Row(HEAD, ("lm_head.weight",), ("VH",), VOCABULARY, present=lambda model: not model.tied_embeddings, head=True),
)


def canonical_name(name: str) -> str:
    """The checkpoint's name of a trunk parameter: the same under both layer specs."""
    from megatron_encdec.model.layers import TORCH_KEYS  # with megatron.core, which waits until a device is chosen

    for torch_spec, checkpoint in TORCH_KEYS.items():
        name = name.replace(f".{torch_spec}", f".{checkpoint}")
    return name


def canonical_weights(trunk: torch.nn.Module) -> Tensors:
    """All parameters of a whole trunk (one process) under canonical names, on the CPU, detached."""
    return {canonical_name(name): parameter.detach().cpu() for name, parameter in trunk.named_parameters()}


def tied_names(rows: Sequence[Row]) -> tuple[str, str]:
    """Their names of the head's table and of the embeddings'. In a tied model the first, if it is there, repeats the
    second."""
    return tuple(next(row.theirs[0] for row in rows if row.ours == ours) for ours in (HEAD, EMBEDDINGS))


def to_hugging_face(weights: Mapping[str, torch.Tensor], model: ModelConfig, rows: Sequence[Row] = ROWS) -> Tensors:
    """Hugging Face tensors of a whole trunk's `weights` (canonical names); contiguous, same dtype. rows: the family's.

    Raises `UserError` naming tensors that are missing or that the table has no place for.
    """
    table = list(expand(model, rows))
    check_names(weights, [ours for ours, _, _ in table], "trunk, seen as its class")
    return {name: tensor.contiguous()
            for ours, theirs, row in table
            for name, tensor in zip(theirs, row.layout.split(weights[ours], model), strict=True)}


def from_hugging_face(tensors: Mapping[str, torch.Tensor], model: ModelConfig, rows: Sequence[Row] = ROWS) -> Tensors:
    """A whole trunk's weights (canonical names, vocabulary without padding) of Hugging Face `tensors`."""
    return {ours: row.layout.join(tuple(tensors[name] for name in theirs), model)
            for ours, theirs, row in expand(model, rows)}


def expand(model: ModelConfig, rows: Sequence[Row] = ROWS) -> Iterator[tuple[str, tuple[str, ...], Row]]:
    """(our name, their names, row) of every tensor of `model`."""
    for row in rows:
        if row.present(model):
            for layer in range(row.first, model.num_layers) if "{}" in row.ours else (0,):
                yield row.ours.format(layer), tuple(name.format(layer) for name in row.theirs), row


def check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuse `what` where the names found in it are not the expected ones; the first few are named."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [f"{word} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
                 for word, names in (("lacks", missing), ("has no place for", unknown)) if names]
        raise UserError(f"{what}: {' and '.join(parts)}")
