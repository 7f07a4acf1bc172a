"""The families of Hugging Face models that a trunk comes from and goes to: one entry each, and all of them here.

    1. `MODEL_FAMILIES`            classes, what a family must and can have, how its config says it
    2. `TARGETS`                   what a checkpoint can become: a family's class under one attention kind
    3. `choose(wish, ...)`         what was asked for, else what the objective trained, as the trunk's family has it
    4. `check_fits(target, ...)`   sizes, features and tokens that the class cannot hold, refused by name

To add a family whose tensors have the names of names.py: add an entry, and its row to the tests' table of
random configs (tests/random_models.py). Everything else reads this module.
"""

from dataclasses import dataclass, field
from typing import Any

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives.base import OBJECTIVES, AttentionKind
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer

# `ModelConfig`'s key -> what all their configs call it
CONFIG_KEYS = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
               "num_attention_heads": "num_attention_heads", "num_query_groups": "num_key_value_heads",
               "head_dim": "head_dim", "tied_embeddings": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
               "init_std": "initializer_range", "vocabulary_size": "vocab_size"}
FEATURES = {"qkv_bias": "biases on queries, keys and values", "qk_norm": "norms on queries and keys",
            "layers_without_rope": "layers without rotary embeddings", "sliding_window": "sliding windows",
            "layers_without_window": "sliding windows of some layers alone"}


@dataclass(frozen=True)
class Family:
    """A family of models in the transformers library."""

    name: str  # transformers' model_type
    config_class: str
    model_class: str  # with the language-model head
    bidirectional: bool = False  # else its classes are decoders, and `is_causal: false` makes an encoder of them
    features: dict[str, bool] = field(default_factory=dict)  # keys of `FEATURES` that it can have; True: always has
    whole_heads: bool = False  # its config refuses a hidden size that is no multiple of the heads
    settings: dict[str, Any] = field(default_factory=dict)  # what its config says besides what all have in common

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


_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
_WINDOWS = {"sliding_window": False, "layers_without_window": False}
MODEL_FAMILIES = {family.name: family for family in (
    Family("llama", "LlamaConfig", "LlamaForCausalLM", whole_heads=True, settings=_NO_BIASES),
    Family("eurobert", "EuroBertConfig", "EuroBertForMaskedLM", bidirectional=True, whole_heads=True,
           settings=_NO_BIASES),
    Family("mistral", "MistralConfig", "MistralForCausalLM", features={"sliding_window": False}),
    Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM", features={"qkv_bias": True, **_WINDOWS}),
    Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM", features={"qk_norm": True, **_WINDOWS},
           settings={"attention_bias": False}),
    Family("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", features={"layers_without_rope": False, **_WINDOWS},
           settings=_NO_BIASES),
)}


@dataclass(frozen=True)
class Target:
    """What `--as` names: a model class of the transformers library under one attention kind."""

    name: str
    family: Family
    attention: AttentionKind

    @property
    def model_class(self) -> str:
        return self.family.model_class

    @property
    def auto_class(self) -> str:
        return "AutoModelForMaskedLM" if self.family.bidirectional else "AutoModelForCausalLM"

    @property
    def is_encoder(self) -> bool:
        return self.attention == "bidirectional"


TARGETS = {target.name: target for target in (
    *(Target(family.name, family, "bidirectional" if family.bidirectional else "causal")
      for family in MODEL_FAMILIES.values()),
    *(Target(f"{family.name}-bidirectional", family, "bidirectional") for family in MODEL_FAMILIES.values()
      if not family.bidirectional))}


def choose(wish: str, objective: str, model: ModelConfig, source: str | None = None) -> Target:
    """The target that `--as` names; for `auto` the class of `objective`, the one trained last, that holds the trunk.

    source: for a checkpoint that an import made, the target that it came from: `auto` gives it back. Else the
    trunk's own family goes first; an encoder becomes EuroBERT where that holds it.
    """
    if wish != "auto":
        if wish not in TARGETS:
            raise UserError(f"--as {wish}: not one of auto, {', '.join(TARGETS)}")
        return TARGETS[wish]
    if source is not None:
        return TARGETS[source]
    if objective not in OBJECTIVES:
        raise UserError(f"--as auto: no class is known for the objective {objective!r}; "
                        f"name one of {', '.join(TARGETS)}")
    attention = OBJECTIVES[objective].attention_of_models()
    candidates = sorted((target for target in TARGETS.values() if target.attention == attention),
                        key=lambda target: (target.name != "eurobert", target.family.name != model.family))
    for target in candidates:
        if target.family.refuses(model) is None:
            return target
    reasons = "; ".join(f"{target.model_class}: {target.family.refuses(model)}" for target in candidates)
    raise UserError(f"--as auto: no {attention} class of transformers holds this trunk ({reasons})")


def check_fits(target: Target, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse what the class cannot hold."""
    if reason := target.family.refuses(model):
        raise UserError(f"--as {target.name}: {target.model_class} cannot hold this trunk: {reason}")
    if target.is_encoder and (tokenizer is None or tokenizer.mask_id is None):
        raise UserError(f"--as {target.name}: {target.model_class} needs a mask token and the run's "
                        f"tokenizer names none; use a causal class, or set tokenizer.mask_token in the run")
