"""The contract of an objective: a pure function from a sample to what the trunk reads and must predict."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from megatron_encdec.data.samples import Sample

AttentionKind = Literal["causal", "bidirectional"]


@dataclass(frozen=True, eq=False)
class Labelled:
    """One window, ready for the trunk: S input tokens, N positions with a target (N may be 0).

    `inputs_S` int64; `positions_N` int64, ascending, in [0, S): whose output predicts `labels_N` (int64).
    """

    inputs_S: np.ndarray
    positions_N: np.ndarray
    labels_N: np.ndarray


class Objective(Protocol):
    """Stateless; `attention` travels with each micro-batch and is never set on the model."""

    name: str
    attention: AttentionKind

    def apply(self, sample: Sample, data_seed: int) -> Labelled:
        """Inputs and targets of `sample`, a function of the arguments alone."""
        ...
