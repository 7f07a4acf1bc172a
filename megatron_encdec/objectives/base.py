"""The contract of an objective: its settings, and a pure function from a sample to what the trunk must predict.

    1. `Objective`         what each objective declares and does; a subclass is found by its name in `OBJECTIVES`
    2. `from_yaml`         `phases.N.objective`: a name, `{name: mlm, mask_ratio: 0.4}`, or the short form `mlm:0.4`
    3. `evaluated(...)`    which objectives a run's validation measures
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.vocabulary import Vocabulary
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError

AttentionKind = Literal["causal", "bidirectional"]
OBJECTIVES: dict[str, type["Objective"]] = {}  # every objective by its name


@dataclass(frozen=True, eq=False)
class Labelled:
    """One window, ready for the trunk: S input tokens, N positions with a target (N may be 0).

    `inputs_S` int64; `positions_N` int64, ascending, in [0, S): whose output predicts `labels_N` (int64).
    """

    inputs_S: np.ndarray
    positions_N: np.ndarray
    labels_N: np.ndarray


@dataclass(frozen=True)
class Objective:
    """An objective with its settings, which are the fields of the subclass; it has no state.

    `attention` travels with each micro-batch and is never set on the model. `predicts`: how far ahead of a labelled
    position its label stands (1: the next token). `hides`: inputs are altered where a label stands, so that the
    tokenizer must have a mask token. `short`: the setting that the short form gives. `yardstick`: every run's
    validation measures it, at its defaults if no phase trains it.
    """

    name: ClassVar[str]
    attention: ClassVar[AttentionKind]
    predicts: ClassVar[int] = 0
    hides: ClassVar[bool] = False
    short: ClassVar[str | None] = None
    yardstick: ClassVar[bool] = False

    def __init_subclass__(cls):
        OBJECTIVES[cls.name] = cls

    def apply(self, sample: Sample, data_seed: int, vocabulary: Vocabulary) -> Labelled:
        """Inputs and targets of `sample`, a function of the arguments alone."""
        raise NotImplementedError

    @classmethod
    def setting_names(cls) -> set[str]:
        """Names of the settings."""
        return {field.name for field in fields(cls)}

    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def identity(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """What of this determines a state: its part of a run's history."""
        return self.to_yaml() | (vocabulary.identity if self.hides else {})

    def label(self) -> str:
        """For people: `clm`, `mlm:0.4`."""
        return f"{self.name}:{getattr(self, self.short):g}" if self.short else self.name

    def short_name(self) -> str:
        """In names of models: `clm`, `mlm40` (the setting in per cent)."""
        return f"{self.name}{100 * getattr(self, self.short):g}" if self.short else self.name

    def to_yaml(self) -> dict[str, Any]:
        """The mapping of a resolved config."""
        return {"name": self.name, **self.settings()}

    @classmethod
    def from_yaml(cls, value: Any, where: str) -> "Objective":
        """The objective that the key `where` names; a setting that is null has its default."""
        if isinstance(value, str):
            value = _from_short(value, where)
        known = ", ".join(OBJECTIVES)
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected {known}, mlm:0.4 or a mapping such as {{name: mlm, mask_ratio: 0.4}}, "
                            f"found {value!r}")
        if "name" not in value:
            raise UserError(f"{where}.name: missing; one of {known}")
        kind = OBJECTIVES[schema.one_of(tuple(OBJECTIVES), value["name"], f"{where}.name")]
        settings = {key: item for key, item in value.items() if key != "name" and item is not None}
        for key in settings.keys() - kind.setting_names():
            if owners := [other.name for other in OBJECTIVES.values() if key in other.setting_names()]:
                raise UserError(f"{where}.{key}: is a setting of {', '.join(owners)}; {kind.name} has none such")
        return schema.build(kind, settings, where)


def _from_short(text: str, where: str) -> dict[str, Any]:
    """`mlm:0.4` as a mapping."""
    name, colon, number = (part.strip() for part in text.partition(":"))
    if not colon:
        return {"name": name}
    kind = OBJECTIVES.get(name)
    if kind is not None and kind.short is None:
        others = ", ".join(f"{one.short} is a setting of {one.name}" for one in OBJECTIVES.values() if one.short)
        raise UserError(f"{where}: {text!r}: {name} takes no number ({others})")
    try:
        return {"name": name, **({kind.short: float(number)} if kind else {})}
    except ValueError:
        raise UserError(f"{where}: {text!r}: after the colon comes a number, {kind.short}, such as mlm:0.4") from None


def of_attention(kind: AttentionKind) -> str:
    """The name of the yardstick with that attention: what a model that came from elsewhere counts as trained for."""
    return next(name for name, one in OBJECTIVES.items() if one.yardstick and one.attention == kind)


def evaluated(trained: Iterable[Objective], has_mask: bool) -> dict[str, Objective]:
    """What validation measures, by name: each objective as the first phase trains it that has it, and the yardsticks.

    trained: the objectives of the phases, in order. has_mask: whether the tokenizer has a mask token.
    """
    found: dict[str, Objective] = {}
    for objective in trained:
        found.setdefault(objective.name, objective)
    for name, kind in OBJECTIVES.items():
        if kind.yardstick and (has_mask or not kind.hides):
            found.setdefault(name, kind())
    return dict(sorted(found.items()))
