"""The shape of the trunk, and its presets."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from megatron_encdec.model.rope import Rope, RopeScaling
from megatron_encdec.platform import schema
from megatron_encdec.platform.device import device_type
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import CUDA_PACKAGES, INSTALL, why_unusable
from megatron_encdec.platform.schema import key

_GLOBAL_EVERY = 3  # layers, in ModernBERT's shape


def _ettin(num_layers: int, hidden_size: int, ffn_hidden_size: int, heads: int) -> dict[str, Any]:
    """ModernBERT's shape (arXiv 2412.13663) in a size of Ettin (arXiv 2507.11412), with the rotary bases that its last
    phase has."""
    return dict(num_layers=num_layers, hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size,
                num_attention_heads=heads, num_query_groups=heads, norm="layernorm", activation="geglu",
                embedding_norm=True, prediction_head="dense", tied_embeddings=True, rope_theta=160000.0,
                local_rope_theta=160000.0, sliding_window=64,
                layers_without_window=list(range(0, num_layers, _GLOBAL_EVERY)))


PRESETS: dict[str, dict[str, Any]] = {  # arXiv 2507.00994, table of models; `tiny` is for a laptop
    "tiny": dict(num_layers=4, hidden_size=256, ffn_hidden_size=768, num_attention_heads=4, num_query_groups=2),
    "210m": dict(num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12, num_query_groups=12),
    "610m": dict(num_layers=26, hidden_size=1152, ffn_hidden_size=4096, num_attention_heads=18, num_query_groups=6),
    "1b": dict(num_layers=28, hidden_size=1728, ffn_hidden_size=5120, num_attention_heads=18, num_query_groups=6),
    "ettin-17m": _ettin(7, 256, 384, 4), "ettin-32m": _ettin(10, 384, 576, 6), "ettin-68m": _ettin(19, 512, 768, 8),
    "ettin-150m": _ettin(22, 768, 1152, 12), "ettin-400m": _ettin(28, 1024, 2624, 16),
    "ettin-1b": _ettin(28, 1792, 3840, 28),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the trunk: pre-norm RMSNorm, SwiGLU, RoPE, no biases (arXiv 2507.00994, model table), unless a key
    says otherwise. In place of a mapping a preset's name will do (`model: 210m`), and `run: RUN_DIR` takes the trunk of
    that run or import. A preset gives the five sizes, those of Ettin the whole of ModernBERT's shape; without one each
    size has to be given."""

    num_layers: int = key("layers")
    hidden_size: int = key("width of the trunk")
    ffn_hidden_size: int = key("inner width of the MLP's gated unit")
    num_attention_heads: int = key("query heads of a layer")
    num_query_groups: int = key("key/value heads of a layer; the tensor-parallel size has to divide it")
    preset: str | None = key("sizes by name: `tiny`, `210m`, `610m`, `1b`; with ModernBERT's shape `ettin-17m`, "
                             "`ettin-32m`, `ettin-68m`, `ettin-150m`, `ettin-400m`, `ettin-1b`", None,
                             later=schema.ANY_TIME)
    head_dim: int | None = key("width of a head; null: hidden_size / num_attention_heads", None)
    tied_embeddings: bool = key("the head's output matrix is the table of the embeddings", False)
    norm: Literal["rmsnorm", "layernorm"] = key("every norm; `layernorm`: with the mean taken away, without a bias "
                                                "(ModernBERT)", "rmsnorm")
    norm_eps: float = key("epsilon of the norms", 1e-5)
    norm_place: Literal["before", "after", "both"] = key(
        "where a layer has the norms of its attention and of its MLP: `before` each, `after` each, before its output "
        "is added (OLMo 2), or `both` (Gemma 2 and 3)", "before")
    norm_zero_centered: bool = key("a norm multiplies by 1 + its weight, which begins at 0 (Gemma)", False)
    embedding_norm: bool = key("a norm behind the embeddings, in the place of the one before the first attention "
                               "(ModernBERT)", False)
    activation: Literal["swiglu", "geglu", "geglu_tanh"] = key(
        "the MLP's gated unit; `geglu`: with the exact gelu (ModernBERT); `geglu_tanh`: with its approximation by tanh "
        "(Gemma)", "swiglu")
    embedding_multiplier: float | None = key("of what the embeddings give (Granite; in Gemma the root of hidden_size); "
                                             "null: 1", None)
    residual_multiplier: float | None = key("of what attention and MLP add to the trunk (Granite); null: 1", None)
    attention_multiplier: float | None = key("of the attention's scores (Granite); null: 1 / sqrt(head_dim)", None)
    attention_softcap: float | None = key("bounds the attention's scores: c * tanh(score / c) (Gemma 2); in torch's "
                                          "layers alone", None)
    logits_scaling: float | None = key("what the logits are divided by (Granite); null: 1", None)
    logits_softcap: float | None = key("bounds the logits: c * tanh(logit / c) (Gemma 2)", None)
    prediction_head: Literal["linear", "dense"] = key(
        "`linear`: the output matrix alone; `dense`: a layer of the trunk's width, gelu and a norm before it, and a "
        "bias behind it (BERT, ModernBERT)", "linear")
    rope_theta: float = key("base of the rotary embedding", 10000.0)
    rope_scaling: RopeScaling | None = key("how the rotary embedding is stretched; null: it is not", None)
    local_rope_theta: float | None = key("base of the rotary embedding in layers with a sliding window, never "
                                         "stretched; null: as in the others", None)
    layers_without_rope: list[int] = key("numbers, from 0, of layers without rotary embedding (SmolLM3)", factory=list)
    sliding_window: int | None = key(
        "bounds attention, as in transformers' configs: at w, a token sees itself and the w - 1 before it (causal), or "
        "itself and w on either side (bidirectional); null: all of its document", None)
    layers_without_window: list[int] = key("numbers, from 0, of layers that `sliding_window` leaves alone",
                                           factory=list)
    qkv_bias: bool = key("biases of queries, keys and values (Qwen2)", False)
    attention_output_bias: bool = key("a bias of the attention's output (Llama with attention_bias)", False)
    qk_norm: bool = key("RMSNorm of queries and keys (Qwen3)", False)
    qk_norm_over: Literal["head", "heads"] = key("what a norm of queries or keys is over: each `head`, or all `heads` "
                                                 "together (OLMo 2)", "head")
    init_std: float = key("standard deviation of the initial weights", 0.02)
    vocabulary_size: int | None = key("tokens that the trunk knows; null: those of the tokenizer", None)
    layers: Literal["auto", "torch", "transformer_engine"] = key(
        "whose layers compute; `auto`: Transformer Engine's on a GPU in bf16 where it works, else torch's", "auto",
        later=schema.ANY_TIME)
    family: str | None = key("the Hugging Face family that the trunk was imported from; an export goes back to it",
                             None, later=schema.ANY_TIME)
    max_positions: int | None = key("positions that the imported model allowed; training does not depend on it, an "
                                    "export allows at least as many", None, later=schema.ANY_TIME)

    def __post_init__(self):
        schema.at_least(self, 1, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                        "num_query_groups")
        schema.at_least(self, 1, "sliding_window")
        schema.at_least(self, 2, "vocabulary_size")
        schema.above(self, 1, "rope_theta", "local_rope_theta")
        schema.above(self, 0, "norm_eps", "init_std", "embedding_multiplier", "residual_multiplier",
                     "attention_multiplier", "attention_softcap", "logits_scaling", "logits_softcap")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(f"num_query_groups: {self.num_query_groups} does not divide "
                             f"num_attention_heads={self.num_attention_heads}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size: {self.hidden_size} is no multiple of num_attention_heads="
                                 f"{self.num_attention_heads}; give model.head_dim")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; rotary embeddings turn pairs")
        for name in ("layers_without_rope", "layers_without_window"):
            for layer in getattr(self, name):
                if not 0 <= layer < self.num_layers:
                    raise ValueError(f"{name}: {layer} is not one of the layers 0..{self.num_layers - 1}")
        for name in ("layers_without_window", "local_rope_theta"):
            if getattr(self, name) and self.sliding_window is None:
                raise ValueError(f"{name}: no layer has a window; set sliding_window, or leave this out")
        if self.norm_zero_centered and self.norm != "rmsnorm":
            raise ValueError(f"norm_zero_centered: true goes with norm=rmsnorm, here it is {self.norm}")
        if self.embedding_norm and self.norm_place == "after":
            raise ValueError("embedding_norm: true takes the place of the norm before the first attention, which "
                             "norm_place=after does without; leave one of the two out")
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise ValueError("qk_norm_over: there are no norms of queries and keys; set qk_norm, or leave this out")
        if self.sliding_window is not None and not self.layers_with_window:
            raise ValueError("layers_without_window: all layers are named; leave this and sliding_window out")

    YAML_KEYS: ClassVar = {"run": str}  # of `from_yaml` alone

    @classmethod
    def from_yaml(cls, value: Any, where: str) -> "ModelConfig":
        """A preset's name, or a mapping with `preset:` and overrides, or every size spelt out. `run: RUN_DIR` in the
        place of a preset means the trunk of that run, imported ones included."""
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a preset's name ({', '.join(PRESETS)}) or a mapping, found {value!r}")
        if "run" in value:
            rest = {key: item for key, item in value.items() if key != "run"}
            value = {**_of_run(value["run"], f"{where}.run"), **rest}
        preset = value.get("preset")
        if preset is not None and preset not in PRESETS:
            raise UserError(f"{where}.preset: {preset!r} is not one of {', '.join(PRESETS)}")
        return schema.build(cls, {**_of_preset(preset, value), **value}, where)

    def identity(self) -> dict[str, Any]:
        """What of this determines a state: the part of a run's history. What a trunk does without is left out."""
        found = schema.to_dict(self)
        absent = {name for name, default in WITHOUT.items() if found[name] == default}
        if self.rope_scaling is not None:
            found["rope_scaling"] = self.rope_scaling.given
        left_out = {"preset", "layers", "family", "max_positions", *absent}
        return {name: value for name, value in found.items() if name not in left_out}

    @property
    def rope(self) -> Rope:
        """The rotary embedding, as far as no phase gives another."""
        return Rope(self.rope_theta, self.rope_scaling, self.local_rope_theta)

    @property
    def initial_norm(self) -> float:
        """Every weight of a norm before training."""
        return 0.0 if self.norm_zero_centered else 1.0

    @property
    def head_is_embeddings(self) -> bool:
        """Whether the head has no parameter of its own."""
        return self.tied_embeddings and self.prediction_head == "linear"

    @property
    def layers_with_window(self) -> list[int]:
        """Numbers, from 0, of layers whose attention `sliding_window` bounds."""
        if self.sliding_window is None:
            return []
        return [layer for layer in range(self.num_layers) if layer not in self.layers_without_window]

    @property
    def padded_vocabulary_size(self) -> int:
        """Rows of the embedding: the same for every tensor-parallel size (which divides num_query_groups)."""
        multiple = math.lcm(128, self.num_query_groups)
        return math.ceil(self.vocabulary_size / multiple) * multiple

    @property
    def parameters_per_layer(self) -> int:
        """Matrix parameters of one layer (norm weights apart)."""
        heads = self.head_dim * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        return self.hidden_size * (heads + 3 * self.ffn_hidden_size)

    def parameter_count(self, with_head: bool = True) -> int:
        """Trainable parameters, vocabulary padding left out; arXiv 2507.00994 counts without the head. The norm of the
        embeddings is one that the first layer does without."""
        layer = self.parameters_per_layer + (4 if self.norm_place == "both" else 2) * self.hidden_size
        if self.qk_norm:
            heads = self.num_attention_heads + self.num_query_groups if self.qk_norm_over == "heads" else 2
            layer += heads * self.head_dim
        layer += self.attention_output_bias * self.hidden_size
        if self.qkv_bias:
            layer += self.head_dim * (self.num_attention_heads + 2 * self.num_query_groups)
        tables = 2 if with_head and not self.tied_embeddings else 1
        dense = with_head and self.prediction_head == "dense"
        return (self.num_layers * layer + self.hidden_size * (1 + tables * self.vocabulary_size)
                + dense * (self.hidden_size * (self.hidden_size + 1) + self.vocabulary_size))

    def check_parallel(self, tensor: int, pipeline: int) -> None:
        """Refuse tensor- and pipeline-parallel sizes that this trunk cannot be cut into."""
        for name in ("num_query_groups", "num_attention_heads", "ffn_hidden_size"):
            if getattr(self, name) % tensor:
                raise UserError(f"parallel.tensor: {tensor} does not divide model.{name}={getattr(self, name)}")
        if self.num_layers % pipeline:
            raise UserError(f"parallel.pipeline: {pipeline} does not divide model.num_layers={self.num_layers}")


# what a trunk does without: the keys, at these values, that are no part of a history
WITHOUT = {"rope_scaling": None, "layers_without_rope": [], "sliding_window": None, "layers_without_window": [],
            "qkv_bias": False, "qk_norm": False, "norm": "rmsnorm", "embedding_norm": False, "activation": "swiglu",
            "prediction_head": "linear", "local_rope_theta": None, "norm_place": "before", "norm_zero_centered": False,
            "embedding_multiplier": None, "residual_multiplier": None, "attention_multiplier": None,
            "attention_softcap": None, "logits_scaling": None, "logits_softcap": None, "attention_output_bias": False,
            "qk_norm_over": "head"}


def _of_preset(name: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The preset's keys; in ModernBERT's shape, which layers are global follows from how many the config asks for, and
    the key/value heads from its heads."""
    found = dict(PRESETS.get(name, {}))
    layers = given.get("num_layers")
    if "layers_without_window" in found and isinstance(layers, int):
        found["layers_without_window"] = list(range(0, layers, _GLOBAL_EVERY))
        if layers == 1 and "sliding_window" not in given:
            found["sliding_window"] = None
    if "layers_without_window" in found and isinstance(heads := given.get("num_attention_heads"), int):
        found["num_query_groups"] = heads  # ModernBERT has a key/value head for each
    if given.get("sliding_window", found.get("sliding_window", 1)) is None:
        for key_of_windows in ("layers_without_window", "local_rope_theta"):
            found.pop(key_of_windows, None)
    return found


def _of_run(run: Any, where: str) -> dict[str, Any]:
    """The model section of a run's config.yaml."""
    path = Path(str(run)) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{where}: {run}: not a run directory (it has no config.yaml)")
    model = schema.load_yaml(path).get("model")
    if not isinstance(model, dict):
        raise UserError(f"{where}: {path} has no model section")
    return {key: value for key, value in model.items() if key != "preset"}


def choose_layers(wanted: str, dtype: torch.dtype, softcap: float | None = None) -> str:
    """"torch" or "transformer_engine" for the configured `model.layers`; the latter's attention takes 16 bits only, and
    bounds no scores (softcap: `model.attention_softcap`)."""
    engine = why_unusable(CUDA_PACKAGES["transformer_engine"]) if device_type() == "cuda" else "no use without a GPU"
    if wanted == "transformer_engine" and engine:
        raise UserError(f"model.layers: transformer_engine needs a CUDA GPU and the package, which is {engine}: "
                        f"{INSTALL['transformer_engine']}; or set model.layers=torch")
    if wanted == "transformer_engine" and dtype != torch.bfloat16:
        raise UserError("model.layers: transformer_engine needs precision.dtype=bf16: its attention over packed "
                        "documents has no fp32 kernels; or set model.layers=torch")
    if wanted == "transformer_engine" and softcap:
        raise UserError(f"model.layers: transformer_engine has no attention with attention_softcap={softcap}; set "
                        "model.layers=torch, or leave it out")
    if wanted == "auto":
        return "torch" if engine or softcap or dtype != torch.bfloat16 else "transformer_engine"
    return wanted
