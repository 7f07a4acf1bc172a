"""Precision: what the numbers are held in, and which FP8 recipe the matrix products of the layers use.

    delayed     one scale a tensor, from the largest values of earlier steps: state, kept in checkpoints
    current     one scale a tensor, from the tensor itself
    blockwise   one scale a block of 128 (activations) or 128 x 128 (weights), from the block itself

The head, norms, softmax, master weights and the optimizer are never in FP8.
"""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.platform import schema

Recipe = Literal["delayed", "current", "blockwise"]
_CORE_NAMES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}
_MULTIPLES = {"delayed": 16, "current": 16, "blockwise": 128}  # of every width of a product, and its tokens
_AT_RESUME = "for the steps to come"
_HISTORY = 1024  # steps whose largest value `delayed` looks back on (Transformer Engine's default)


@dataclass(frozen=True)
class PrecisionSettings:
    """What the numbers are held in. It may change where a run goes on; steps that are done stay done in theirs."""

    dtype: Literal["bf16", "fp32"] | None = schema.key(
        "`bf16`: bf16 parameters with fp32 masters; null: bf16 where the device is quick at it, else fp32", None,
        later=_AT_RESUME)
    fp8: Recipe | None = schema.key("recipe of FP8 for the products of the layers (Transformer Engine); null: none",
                                    None, later=_AT_RESUME)
    fp8_bf16_first: int = schema.key("so many layers at the start stay in bf16 (not with `delayed`)", 0,
                                     later=_AT_RESUME)
    fp8_bf16_last: int = schema.key("so many layers at the end stay in bf16 (not with `delayed`)", 0, later=_AT_RESUME)
    fp8_evaluation: bool = schema.key("evaluate in FP8 too, not in bf16", False, later=schema.ANY_TIME)

    def __post_init__(self):
        schema.at_least(self, 0, "fp8_bf16_first", "fp8_bf16_last")
        for name, layers in self.layers_in_bf16.items():
            if self.fp8 is None:
                raise ValueError(f"{name}: {layers} layers in bf16 instead of fp8, but fp8 is not set")
            if self.fp8 == "delayed":
                raise ValueError(f"{name}: the delayed recipe reduces its history once for all layers and cannot leave "
                                 "some out; use fp8: current or blockwise")
        if self.fp8 and self.dtype == "fp32":
            raise ValueError("dtype: fp32 and fp8 exclude each other; fp8 goes with bf16")

    def identity(self) -> dict[str, Any]:
        """What of this determines a state: part of a run's history."""
        return {"dtype": self.dtype, "fp8": self.fp8, **self.layers_in_bf16}

    @property
    def layers_in_bf16(self) -> dict[str, int]:
        """Those that FP8 leaves out, by key; {} where there are none."""
        return {name: getattr(self, name) for name in ("fp8_bf16_first", "fp8_bf16_last") if getattr(self, name)}


def fp8_shape_problems(model: ModelConfig, recipe: Recipe, tensor: int, tokens: int) -> list[str]:
    """A line for each width that `recipe` cannot take, cut over `tensor` ranks, with `tokens` in a micro-batch."""
    multiple = _MULTIPLES[recipe]
    heads = model.head_dim * (model.num_attention_heads + 2 * model.num_query_groups)
    widths = {
        "model.hidden_size": model.hidden_size,
        "queries, keys and values (model.head_dim x (num_attention_heads + 2 num_query_groups))": heads // tensor,
        "attention output (model.head_dim x num_attention_heads)": model.head_dim * model.num_attention_heads // tensor,
        "gate and up projection (2 x model.ffn_hidden_size)": 2 * model.ffn_hidden_size // tensor,
        "model.ffn_hidden_size": model.ffn_hidden_size // tensor,
    }
    share = f" over parallel.tensor={tensor}" if tensor > 1 else ""
    problems = [f"{name}{share} is {width}, no multiple of {multiple}"
                for name, width in widths.items() if width % multiple]
    if tokens % multiple:
        problems.append(f"batch.micro_size x data.sequence_length is {tokens} tokens a rank, no multiple of {multiple}")
    return problems


def fp8_options(precision: PrecisionSettings) -> dict[str, Any]:
    """Fields of megatron.core's TransformerConfig; {} without FP8. Forward in E4M3, gradients in E5M2 (`hybrid`)."""
    if precision.fp8 is None:
        return {}
    options = {"fp8": "hybrid", "fp8_recipe": _CORE_NAMES[precision.fp8]}
    if precision.fp8 == "delayed":
        options |= {"fp8_amax_history_len": _HISTORY, "fp8_amax_compute_algo": "max"}
    elif precision.fp8 == "blockwise":
        options["fp8"] = "e4m3"  # blocks are scaled finely enough; the only format of the kernels for Hopper
    if precision.layers_in_bf16:
        options |= {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": precision.fp8_bf16_first,
                    "num_layers_at_end_in_bf16": precision.fp8_bf16_last}
    return options
