"""What every family answers: what its config means for a trunk, and how a trunk is written in its terms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_encdec.interop.names import ROWS, Row
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives.base import AttentionKind

# What a body without a language-model head is called, after the family's own prefix.
HEADLESS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


@dataclass(frozen=True)
class Family:
    """A family of models in the transformers library. attentions: the kinds that its classes compute; the first is
    theirs, another one is a decoder's with `is_causal: false`."""

    name: str  # transformers' model_type
    config_class: str
    model_class: str  # with the language-model head
    attentions: tuple[AttentionKind, ...] = ("causal", "bidirectional")

    rows: ClassVar[tuple[Row, ...]] = ROWS  # its tensors' names
    cosmetic: ClassVar[frozenset[str]] = frozenset()  # of its config's keys, those that change nothing
    eager: ClassVar[bool] = False  # transformers computes all of its attention on the eager path alone

    def read(self, config) -> dict[str, Any]:
        """`ModelConfig`'s keys for an instance of the config class. Raises `UserError` or `ValueError`."""
        raise NotImplementedError

    def refused(self, config) -> list[str]:
        """What of `config` the trunk does not compute, each by its key."""
        raise NotImplementedError

    def remarks(self, content: dict[str, Any], config) -> list[str]:
        """Where config.json, whose keys `content` has, says a thing twice and differently: what transformers takes."""
        raise NotImplementedError

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """What its config says of the trunk `model`; token ids and positions apart."""
        raise NotImplementedError

    def turned(self, model: ModelConfig) -> dict[str, Any]:
        """What its config says besides for the second of `attentions`, in the place of what `write` says."""
        return {"is_causal": False}

    def ids(self, special: Mapping[str, int | None]) -> dict[str, int | None]:
        """What its config says of tokens. special: ids of bos, cls, sep, pad, eos, mask, as far as they are known."""
        known = {name: special[name] for name in ("pad", "eos", "mask") if name in special}
        return {f"{name}_token_id": token for name, token in {"bos": special.get("bos"), **known}.items()}

    def refuses(self, model: ModelConfig) -> str | None:
        """What of the trunk its classes cannot hold, for people; None where they hold all."""
        raise NotImplementedError

    def attention_of(self, config) -> AttentionKind:
        """What an instance of the config class asks for."""
        return self.attentions[int(len(self.attentions) > 1 and getattr(config, "is_causal", True) is False)]

    def is_of(self, architecture: str) -> bool:
        """Whether it is one of its classes."""
        stem = self.model_class.partition("For")[0]
        return architecture in (self.model_class, *(stem + ending for ending in HEADLESS))


@dataclass(frozen=True)
class Target:
    """What `--as` names: a model class of the transformers library under one attention kind."""

    family: Family
    attention: AttentionKind

    @property
    def is_native(self) -> bool:
        """Whether the class is made for this attention."""
        return self.attention == self.family.attentions[0]

    @property
    def name(self) -> str:
        return self.family.name + ("" if self.is_native else f"-{self.attention}")

    @property
    def model_class(self) -> str:
        return self.family.model_class

    @property
    def auto_class(self) -> str:
        return "AutoModelForMaskedLM" if self.family.attentions[0] == "bidirectional" else "AutoModelForCausalLM"

    @property
    def is_encoder(self) -> bool:
        return self.attention == "bidirectional"
