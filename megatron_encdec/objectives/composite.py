"""What objectives that are made of others have in common: a list of parts, each with an amount (steps, or a weight)."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_encdec.objectives.base import AttentionKind, Objective, Vocabulary

_MOST = 1_000_000_000  # an amount: sums of them are exact enough


@dataclass(frozen=True)
class Composite(Objective):
    """`listed`: the setting that lists the parts; `amount`: what beside its `objective` each of them has."""

    listed: ClassVar[str]
    amount: ClassVar[str]

    def __post_init__(self):
        if not self._parts:
            raise ValueError(f"{self.listed}: empty; give at least one part, such as {{objective: clm, "
                             f"{self.amount}: 1}}")
        for number, part in enumerate(self._parts):
            where, amount = f"{self.listed}.{number}", getattr(part, self.amount)
            if not 0 < amount <= _MOST:
                bound = f"at most {_MOST:,}" if amount > 0 else "above 0"
                raise ValueError(f"{where}.{self.amount}: must be {bound}, found {amount}")
            if isinstance(part.objective, Composite):
                raise ValueError(f"{where}.objective: {part.objective.name} inside {self.name}; parts are single "
                                 "objectives, such as clm or mlm")

    @property
    def _parts(self) -> tuple:
        return getattr(self, self.listed)

    @property
    def hides(self) -> bool:
        return any(part.objective.hides for part in self._parts)

    @property
    def by_words(self) -> bool:
        return any(part.objective.by_words for part in self._parts)

    @property
    def attention(self) -> AttentionKind:
        """Bidirectional where some part is; a micro-batch has that of its own part."""
        kinds = [part.objective.attention for part in self._parts]
        return "bidirectional" if "bidirectional" in kinds else kinds[0]

    @classmethod
    def attention_of_models(cls) -> AttentionKind:
        """What ended with several objectives at once is an encoder."""
        return "bidirectional"

    def shares(self) -> list[tuple[float, Objective]]:
        total = sum(getattr(part, self.amount) for part in self._parts)
        return [(getattr(part, self.amount) / total, part.objective.at(1, 1)) for part in self._parts]

    def check(self, vocabulary: Vocabulary, where: str) -> None:
        for number, part in enumerate(self._parts):
            part.objective.check(vocabulary, f"{where}.{self.listed}.{number}.objective")

    def progress(self, done: int, steps: int) -> dict[str, int]:
        return {key: value for part in self._parts for key, value in part.objective.progress(done, steps).items()}

    def label(self) -> str:
        """`mixture (15 mlm:0.4, 1 clm)`."""
        parts = ", ".join(f"{getattr(part, self.amount):g} {part.objective.label()}" for part in self._parts)
        return f"{self.name} ({parts})"

    def short_name(self) -> str:
        """`mixture_15mlm40_1clm`; parts of the same objective are one."""
        amounts: dict[str, float] = {}
        for part in self._parts:
            name = part.objective.short_name()
            amounts[name] = amounts.get(name, 0) + getattr(part, self.amount)
        return "_".join([self.name, *(f"{amount:g}{name}" for name, amount in amounts.items())])
