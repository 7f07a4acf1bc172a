"""The families of Hugging Face models that a trunk comes from and goes to: one entry each, and all of them here.

    1. `FAMILIES`              classes, what a family must and can have, how its config says it
    2. `TARGETS`               what a checkpoint can become: a family's class under one attention kind
    3. `Family.refuses(...)`   why a trunk is not of this family, or None

To add a family whose tensors have the names of `names.LLAMA`: add an entry, and its row to the tests' table of
random configs (tests/random_models.py). Everything else reads this module.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_encdec.interop.names import LLAMA, NameTable
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives.base import AttentionKind


@dataclass(frozen=True)
class Family:
    """A family of models in the transformers library.

    bidirectional: its classes are encoders; else they are decoders, and `is_causal: false` in the config makes an
    encoder of them. features: the `ModelConfig` keys among `FEATURES` that it can have, with True where it always
    has them. whole_heads: its config refuses a hidden size that is no multiple of the heads. settings: what its
    config says besides what all have in common.
    """

    name: str
    model_type: str
    config_class: str
    model_class: str  # with the language-model head
    bidirectional: bool = False
    features: dict[str, bool] = field(default_factory=dict)
    whole_heads: bool = False
    settings: Callable[[ModelConfig], dict] = lambda model: {}
    names: NameTable = LLAMA

    def refuses(self, model: ModelConfig) -> str | None:
        """What of the trunk its classes cannot hold, for people; None where they hold all."""
        if self.whole_heads and model.hidden_size % model.num_attention_heads:
            return (f"its hidden size must be a multiple of the heads; here model.hidden_size={model.hidden_size}, "
                    f"model.num_attention_heads={model.num_attention_heads}")
        for key, what in FEATURES.items():
            has = bool(getattr(model, key))
            if has and key not in self.features:
                return f"it has no {what} (model.{key})"
            if not has and self.features.get(key):
                return f"it always has {what}, this trunk has none (model.{key})"
        return None


FEATURES = {"qkv_bias": "biases on queries, keys and values", "qk_norm": "norms on queries and keys",
            "layers_without_rope": "layers without rotary embeddings"}


def _no_window(_model: ModelConfig) -> dict:
    return {"sliding_window": None}


def _no_biases(_model: ModelConfig) -> dict:
    return {"attention_bias": False, "mlp_bias": False}


def _smollm3(model: ModelConfig) -> dict:
    with_rope = [int(layer not in model.layers_without_rope) for layer in range(model.num_layers)]
    return {**_no_biases(model), "no_rope_layers": with_rope, "use_sliding_window": False}


FAMILIES = {family.name: family for family in (
    Family("llama", "llama", "LlamaConfig", "LlamaForCausalLM", whole_heads=True, settings=_no_biases),
    Family("eurobert", "eurobert", "EuroBertConfig", "EuroBertForMaskedLM", bidirectional=True, whole_heads=True,
           settings=_no_biases),
    Family("mistral", "mistral", "MistralConfig", "MistralForCausalLM", settings=_no_window),
    Family("qwen2", "qwen2", "Qwen2Config", "Qwen2ForCausalLM", features={"qkv_bias": True},
           settings=lambda _model: {"use_sliding_window": False}),
    Family("qwen3", "qwen3", "Qwen3Config", "Qwen3ForCausalLM", features={"qk_norm": True},
           settings=lambda _model: {"use_sliding_window": False, "attention_bias": False}),
    Family("smollm3", "smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", features={"layers_without_rope": False},
           settings=_smollm3),
)}


@dataclass(frozen=True)
class Target:
    """What `--as` names: a model class of the transformers library under one attention kind."""

    name: str
    family: Family
    attention: AttentionKind

    @property
    def model_class(self) -> str:
        """The class that the result loads as."""
        return self.family.model_class

    @property
    def auto_class(self) -> str:
        """The Auto class that finds it."""
        return "AutoModelForMaskedLM" if self.family.bidirectional else "AutoModelForCausalLM"

    @property
    def is_encoder(self) -> bool:
        """Whether every token sees every token."""
        return self.attention == "bidirectional"

    @property
    def task(self) -> str:
        """Of transformers' `pipeline`. An encoder is of use only with a mask token."""
        return "fill-mask" if self.is_encoder else "text-generation"


def _targets() -> dict[str, Target]:
    found = {}
    for family in FAMILIES.values():
        kind = "bidirectional" if family.bidirectional else "causal"
        found[family.name] = Target(family.name, family, kind)
    for family in FAMILIES.values():
        if not family.bidirectional:
            name = f"{family.name}-bidirectional"
            found[name] = Target(name, family, "bidirectional")
    return found


TARGETS = _targets()
