"""The shape of the trunk and its presets (PAPER table of models: 210M, 610M, 1B; `tiny` for a laptop)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_encdec.platform import schema
from megatron_encdec.platform.device import device_type
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import INSTALL, is_available

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(num_layers=4, hidden_size=256, ffn_hidden_size=768, num_attention_heads=4, num_query_groups=2),
    "210m": dict(num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12,
                 num_query_groups=12),
    "610m": dict(num_layers=26, hidden_size=1152, ffn_hidden_size=4096, num_attention_heads=18,
                 num_query_groups=6),
    "1b": dict(num_layers=28, hidden_size=1728, ffn_hidden_size=5120, num_attention_heads=18,
               num_query_groups=6),
}


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm RMSNorm, SwiGLU, RoPE trunk without biases (arXiv 2507.00994, model table)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    preset: str | None = None
    head_dim: int | None = None  # hidden_size / num_attention_heads unless given
    tied_embeddings: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    init_std: float = 0.02
    vocabulary_size: int | None = None  # the tokenizer's, filled in when the run starts
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"

    def __post_init__(self):
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
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
        if self.vocabulary_size is not None and self.vocabulary_size < 2:
            raise ValueError(f"vocabulary_size: {self.vocabulary_size} is too small")

    @classmethod
    def from_yaml(cls, value: Any, where: str) -> "ModelConfig":
        """A preset's name, or a mapping with `preset:` and overrides, or every size spelt out."""
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a preset's name ({', '.join(PRESETS)}) or a mapping, found {value!r}")
        preset = value.get("preset")
        if preset is not None and preset not in PRESETS:
            raise UserError(f"{where}.preset: {preset!r} is not one of {', '.join(PRESETS)}")
        return schema.build(cls, {**PRESETS.get(preset, {}), **value}, where)

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
        """Trainable parameters, vocabulary padding left out; the paper counts without the head."""
        norms = self.hidden_size * (2 * self.num_layers + 1)
        tables = 2 if with_head and not self.tied_embeddings else 1
        return (self.num_layers * self.parameters_per_layer + norms
                + tables * self.vocabulary_size * self.hidden_size)

    def check_parallel(self, tensor: int, pipeline: int) -> None:
        """Refuse tensor- and pipeline-parallel sizes that this trunk cannot be cut into."""
        for name in ("num_query_groups", "num_attention_heads", "ffn_hidden_size"):
            if getattr(self, name) % tensor:
                raise UserError(f"parallel.tensor: {tensor} does not divide model.{name}={getattr(self, name)}")
        if self.num_layers % pipeline:
            raise UserError(f"parallel.pipeline: {pipeline} does not divide model.num_layers={self.num_layers}")


def choose_layers(wanted: str) -> str:
    """"torch" or "transformer_engine" for the configured `model.layers`."""
    usable = device_type() == "cuda" and is_available("transformer_engine")
    if wanted == "transformer_engine" and not usable:
        raise UserError("model.layers: transformer_engine needs a CUDA GPU and the package: "
                        f"{INSTALL['transformer_engine']}; or set model.layers=torch")
    if wanted == "auto":
        return "transformer_engine" if usable else "torch"
    return wanted
