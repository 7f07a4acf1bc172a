"""Objectives in turn: the steps of a phase go through a cycle of them, again and again.

AntLM (arXiv 2412.03275) goes so from CLM to MLM and back: 4 epochs, 16, and 4. A cycle counts from the phase's first
step; what of a part changes over the phase, such as a ratio, goes by the phase's steps, not by the part's.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Labelled, Objective, Vocabulary
from megatron_encdec.objectives.composite import Composite
from megatron_encdec.platform.schema import key


@dataclass(frozen=True)
class Turn:
    """One objective for some steps."""

    objective: Objective = key("what is trained in this turn: a single objective")
    steps: int = key("steps of this turn")


@dataclass(frozen=True)
class Alternate(Composite):
    """The turns of `cycle` in their order, then from the first again."""

    name: ClassVar[str] = "alternate"
    listed: ClassVar[str] = "cycle"
    amount: ClassVar[str] = "steps"

    cycle: tuple[Turn, ...] = key("the turns, in order; after the last the first begins again")

    def at(self, step: int, steps: int) -> Objective:
        """The objective whose turn it is."""
        place = (step - 1) % sum(turn.steps for turn in self.cycle)
        for turn in self.cycle:
            if place < turn.steps:
                return turn.objective.at(step, steps)
            place -= turn.steps
        raise AssertionError(f"{place} steps beyond the cycle")

    def progress(self, done: int, steps: int) -> dict[str, int]:
        return {"done": done} | super().progress(done, steps)

    def apply(self, sample: Sample, data_seed: int, vocabulary: Vocabulary) -> Labelled:
        """As in the first step."""
        return self.at(1, 1).apply(sample, data_seed, vocabulary)
