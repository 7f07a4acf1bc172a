"""Objectives side by side: each sample of a batch is trained for one of them.

GPT-BERT (arXiv 2410.24159) mixes so, masked and causal 15 to 1, by rank; here it is by sample, whatever the ranks. The
sum of all labels' losses is divided by their number: each label weighs the same.

Which one is an independent draw from the stream of (data.seed, sample number) by the parts' weights: the same on every
topology and after every restart. Not a low-discrepancy sequence, though that would vary less from batch to batch: the
source of sample i follows such a sequence too, and two of them can fall into step, so that a source is read under one
objective alone.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from megatron_encdec.data.draws import uniforms
from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Labelled, Objective, Vocabulary
from megatron_encdec.objectives.composite import Composite
from megatron_encdec.platform.schema import key


@dataclass(frozen=True)
class Part:
    """One objective, drawn in proportion to its weight."""

    objective: Objective = key("what its samples are trained for: a single objective")
    weight: float = key("share of the samples, relative to the other parts", 1.0)


@dataclass(frozen=True)
class Mixture(Composite):
    """Each sample has one of `parts`."""

    name: ClassVar[str] = "mixture"
    listed: ClassVar[str] = "parts"
    amount: ClassVar[str] = "weight"

    parts: tuple[Part, ...] = key("the objectives; each sample is trained for one of them")

    def at(self, step: int, steps: int) -> "Mixture":
        """With each part as it is in that update."""
        parts = tuple(replace(part, objective=part.objective.at(step, steps)) for part in self.parts)
        return replace(self, parts=parts)

    def of_sample(self, data_seed: int, index: int) -> Objective:
        """The first part whose weight, with those before it, exceeds the sample's draw."""
        left = sum(part.weight for part in self.parts) * float(uniforms(data_seed, "mixture", index, 1)[0])
        for part in self.parts:
            left -= part.weight
            if left < 0:
                return part.objective
        return self.parts[-1].objective

    def apply(self, sample: Sample, data_seed: int, vocabulary: Vocabulary) -> Labelled:
        """As the sample's own objective."""
        return self.of_sample(data_seed, sample.index).apply(sample, data_seed, vocabulary)
