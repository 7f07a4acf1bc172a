"""Causal language modelling: position t predicts token t + 1 of its own segment."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import AttentionKind, Labelled, Objective, Vocabulary


@dataclass(frozen=True)
class CLM(Objective):
    """Next token; the last position of each segment, and so of the window, has no target."""

    name: ClassVar[str] = "clm"
    attention: ClassVar[AttentionKind] = "causal"
    predicts: ClassVar[int] = 1
    yardstick: ClassVar[bool] = True

    def apply(self, sample: Sample, data_seed: int, vocabulary: Vocabulary) -> Labelled:
        """Inputs unchanged; S minus the number of segments targets."""
        tokens_S = sample.tokens_S
        has_target_S = np.ones(len(tokens_S), dtype=bool)
        has_target_S[sample.segment_ends_E - 1] = False
        positions_N = np.flatnonzero(has_target_S)
        return Labelled(tokens_S, positions_N, tokens_S[positions_N + 1])
