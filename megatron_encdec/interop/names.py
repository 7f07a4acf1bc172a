"""The name table: how each tensor of a Hugging Face model comes from the trunk's, and back.

    1. `canonical_weights(trunk)`          the trunk's tensors under their names in a checkpoint
    2. `to_hugging_face(weights, ...)`     trunk tensors -> Hugging Face tensors, vocabulary padding cut off
    3. `from_hugging_face(weights, ...)`   the way back, vocabulary padded with zeros
    4. `expand(names, model)`, `check_names`   the rows of one model; what is missing or has no place

All families of `families.py` share one table: they differ in which rows are there. A family with other names is a
new `NameTable`: a row for each tensor, with its shapes and the functions that cut and join it.

Legend: A query heads, G query groups (key/value heads), D head dimension, F feed-forward width, V vocabulary.
Rotary positions turn halves on both sides, so no row is permuted for them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.platform.errors import UserError

Tensors = dict[str, torch.Tensor]

# Transformer Engine keeps a norm inside the linear layer after it; checkpoints use its names for both specs.
_TORCH_SPEC_NAMES = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
                     "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


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


def split_gate_up(fused: torch.Tensor, _model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """gate [F, ...] and up [F, ...] of [2 * F, ...]."""
    return fused.chunk(2)


def join_gate_up(parts: tuple[torch.Tensor, ...], _model: ModelConfig) -> torch.Tensor:
    """The inverse of `split_gate_up`."""
    return torch.cat(parts)


def trim_vocabulary(table: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """The real rows [V, ...] of a padded table."""
    return (table[: model.vocabulary_size],)


def pad_vocabulary(parts: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    """[padded V, ...] with zeros below: padding takes no part in embedding, softmax or gradient."""
    (table,) = parts
    padding = table.new_zeros(model.padded_vocabulary_size - table.shape[0], *table.shape[1:])
    return torch.cat((table, padding))


def _same(tensor: torch.Tensor, _model: ModelConfig) -> tuple[torch.Tensor, ...]:
    return (tensor,)


def _only(parts: tuple[torch.Tensor, ...], _model: ModelConfig) -> torch.Tensor:
    return parts[0]


def _always(_model: ModelConfig) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """A trunk tensor and the Hugging Face tensors that it holds; `{}` in a name is the layer's number."""

    ours: str
    theirs: tuple[str, ...]
    shapes: Callable[[ModelConfig], tuple[tuple[int, ...], ...]]  # of `theirs`
    split: Callable[[torch.Tensor, ModelConfig], tuple[torch.Tensor, ...]] = _same
    join: Callable[[tuple[torch.Tensor, ...], ModelConfig], torch.Tensor] = _only
    present: Callable[[ModelConfig], bool] = _always


@dataclass(frozen=True)
class NameTable:
    """All tensors of a family of Hugging Face models."""

    name: str
    rows: tuple[Row, ...]
    tied: tuple[str, str]  # in a tied model the first, if it is there at all, repeats the second


def _norm_shape(model):
    return ((model.hidden_size,),)


def _qkv_shapes(model):
    keys = (model.head_dim * model.num_query_groups, model.hidden_size)
    return (model.head_dim * model.num_attention_heads, model.hidden_size), keys, keys


def _qkv_bias_shapes(model):
    return tuple(shape[:1] for shape in _qkv_shapes(model))


def _head_norm_shape(model):
    return ((model.head_dim,),)


def _projection_shape(model):
    return ((model.hidden_size, model.head_dim * model.num_attention_heads),)


def _gate_up_shapes(model):
    return ((model.ffn_hidden_size, model.hidden_size),) * 2


def _down_shape(model):
    return ((model.hidden_size, model.ffn_hidden_size),)


def _table_shape(model):
    return ((model.vocabulary_size, model.hidden_size),)


def _untied(model):
    return not model.tied_embeddings


def _qkv_bias(model):
    return model.qkv_bias


def _qk_norm(model):
    return model.qk_norm


_OURS, _THEIRS = "decoder.layers.{}.", "model.layers.{}."
# Llama, Mistral, Qwen2, Qwen3, SmolLM3 and EuroBERT have these names in common.
LLAMA = NameTable("Llama", tied=("lm_head.weight", "model.embed_tokens.weight"), rows=(
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _table_shape,
        trim_vocabulary, pad_vocabulary),
    Row(_OURS + "self_attention.linear_qkv.layer_norm_weight", (_THEIRS + "input_layernorm.weight",),
        _norm_shape),
    Row(_OURS + "self_attention.linear_qkv.weight",
        tuple(f"{_THEIRS}self_attn.{part}_proj.weight" for part in "qkv"), _qkv_shapes, split_qkv, join_qkv),
    Row(_OURS + "self_attention.linear_qkv.bias",
        tuple(f"{_THEIRS}self_attn.{part}_proj.bias" for part in "qkv"), _qkv_bias_shapes, split_qkv, join_qkv,
        _qkv_bias),
    Row(_OURS + "self_attention.q_layernorm.weight", (_THEIRS + "self_attn.q_norm.weight",), _head_norm_shape,
        present=_qk_norm),
    Row(_OURS + "self_attention.k_layernorm.weight", (_THEIRS + "self_attn.k_norm.weight",), _head_norm_shape,
        present=_qk_norm),
    Row(_OURS + "self_attention.linear_proj.weight", (_THEIRS + "self_attn.o_proj.weight",),
        _projection_shape),
    Row(_OURS + "mlp.linear_fc1.layer_norm_weight", (_THEIRS + "post_attention_layernorm.weight",),
        _norm_shape),
    Row(_OURS + "mlp.linear_fc1.weight", (_THEIRS + "mlp.gate_proj.weight", _THEIRS + "mlp.up_proj.weight"),
        _gate_up_shapes, split_gate_up, join_gate_up),
    Row(_OURS + "mlp.linear_fc2.weight", (_THEIRS + "mlp.down_proj.weight",), _down_shape),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), _norm_shape),
    Row("output_layer.weight", ("lm_head.weight",), _table_shape, trim_vocabulary, pad_vocabulary, _untied),
))


def canonical_name(name: str) -> str:
    """The checkpoint's name of a trunk parameter: the same under both layer specs."""
    for torch_spec, checkpoint in _TORCH_SPEC_NAMES.items():
        if name.endswith("." + torch_spec):
            return name.removesuffix(torch_spec) + checkpoint
    return name


def canonical_weights(trunk: torch.nn.Module) -> Tensors:
    """All parameters of a whole trunk (one process) under canonical names, on the CPU, detached."""
    return {canonical_name(name): parameter.detach().cpu() for name, parameter in trunk.named_parameters()}


def to_hugging_face(weights: Mapping[str, torch.Tensor], model: ModelConfig,
                    names: NameTable = LLAMA) -> Tensors:
    """Hugging Face tensors of a whole trunk's `weights` (canonical names); contiguous, same dtype.

    Raises `UserError` naming tensors that are missing or that the table has no place for.
    """
    table = list(expand(names, model))
    check_names(weights, [ours for ours, _, _ in table], f"trunk, seen as {names.name}")
    return {name: tensor.contiguous()
            for ours, theirs, row in table
            for name, tensor in zip(theirs, row.split(weights[ours], model), strict=True)}


def from_hugging_face(weights: Mapping[str, torch.Tensor], model: ModelConfig,
                      names: NameTable = LLAMA) -> Tensors:
    """The trunk's tensors (canonical names) of a Hugging Face state dict: the inverse of `to_hugging_face`.

    A tied model may repeat the embedding as its head. Raises `UserError` naming tensors that are missing,
    unknown, or of a shape that `model` does not have.
    """
    weights, (repeated, original) = dict(weights), names.tied
    head = weights.pop(repeated, None) if model.tied_embeddings else None
    if head is not None and original in weights and not torch.equal(head, weights[original]):
        raise UserError(f"{repeated}: differs from {original}, but model.tied_embeddings is true")
    table = list(expand(names, model))
    check_names(weights, [name for _, theirs, _ in table for name in theirs], f"{names.name} model")
    out = {}
    for ours, theirs, row in table:
        parts = tuple(weights[name] for name in theirs)
        for name, part, shape in zip(theirs, parts, row.shapes(model), strict=True):
            if tuple(part.shape) != shape:
                raise UserError(f"{name}: has shape {list(part.shape)}, the model's sizes ask for "
                                f"{list(shape)}")
        out[ours] = row.join(parts, model)
    return out


def expand(names: NameTable, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], Row]]:
    """(our name, their names, row) of every tensor of `model`."""
    for row in names.rows:
        if row.present(model):
            for layer in range(model.num_layers if "{}" in row.ours else 1):
                yield row.ours.format(layer), tuple(name.format(layer) for name in row.theirs), row


def check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuse `what` where the names found in it are not the expected ones; the first few are named."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [f"{word} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
                 for word, names in (("lacks", missing), ("has no place for", unknown)) if names]
        raise UserError(f"{what}: {' and '.join(parts)}")
