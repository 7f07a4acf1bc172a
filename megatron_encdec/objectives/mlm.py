"""Masked language modelling: hide some tokens and predict each at its own position (unshifted).

    1. Draw three uniforms a position from the counter-based stream of (data.seed, sample number):
       chosen?, how hidden?, which random token?
    2. Choose the ordinary tokens whose first uniform is below `mask_ratio`: i.i.d., so their number varies.
    3. Hide a chosen token: mask token, random token, or as it is, by the second uniform.

Always the same draws in the same order: a position chosen at ratio 0.2 is also chosen at 0.4, and runs that
differ in ratio or in the way of hiding are paired position by position.
Rule: arXiv 2507.00994 (i.i.d. masking, always the mask token, special tokens never masked); the 80/10/10
split is that of BERT (arXiv 1810.04805, section 3.1).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_encdec.data.draws import uniforms
from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import AttentionKind, Labelled, Objective, Vocabulary
from megatron_encdec.platform.errors import UserError


@dataclass(frozen=True)
class MLM(Objective):
    """Masked tokens, seen from both sides. `mask_ratio`, in (0, 1): the share of ordinary tokens to predict. Of these,
    `mask_fraction` become the mask token, `random_fraction` an ordinary token drawn uniformly from the vocabulary, the
    rest stay as they are; all of them are predicted. BERT's 80/10/10 is 0.8 and 0.1."""

    name: ClassVar[str] = "mlm"
    attention: ClassVar[AttentionKind] = "bidirectional"
    hides: ClassVar[bool] = True
    short: ClassVar[str | None] = "mask_ratio"
    yardstick: ClassVar[bool] = True

    mask_ratio: float = 0.4
    mask_fraction: float = 1.0
    random_fraction: float = 0.0

    def __post_init__(self):
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio: must be above 0 and below 1, found {self.mask_ratio}")
        for key in ("mask_fraction", "random_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: must be from 0 to 1, found {getattr(self, key)}")
        if self.mask_fraction + self.random_fraction > 1 + 1e-9:
            raise ValueError(f"random_fraction: with mask_fraction {self.mask_fraction} at most "
                             f"{1 - self.mask_fraction:.4g} remains, found {self.random_fraction}")

    def label(self) -> str:
        """`mlm:0.4`, or with BERT's way of hiding `mlm:0.15 (mask 0.8, random 0.1)`."""
        if self.mask_fraction == 1.0:
            return super().label()
        return f"{super().label()} (mask {self.mask_fraction:g}, random {self.random_fraction:g})"

    def apply(self, sample: Sample, data_seed: int, vocabulary: Vocabulary) -> Labelled:
        """Labels at the chosen positions only: none where the window holds special tokens alone."""
        tokens_S = sample.tokens_S
        chosen_S, how_S, which_S = uniforms(data_seed, "mask", sample.index, 3 * len(tokens_S)).reshape(3, -1)
        try:
            ordinary_S = vocabulary.ordinary_V[tokens_S]
        except IndexError:
            raise UserError(f"sample {sample.index} holds token id {tokens_S.max()}, outside the tokenizer's "
                            f"vocabulary of {vocabulary.size}: the data was written with another tokenizer") from None
        positions_N = np.flatnonzero((chosen_S < self.mask_ratio) & ordinary_S)
        labels_N = tokens_S[positions_N]
        inputs_S = tokens_S.copy()
        inputs_S[positions_N] = self._hide(labels_N, how_S[positions_N], which_S[positions_N], vocabulary)
        return Labelled(inputs_S, positions_N, labels_N)

    def _hide(self, labels_N: np.ndarray, how_N: np.ndarray, which_N: np.ndarray,
              vocabulary: Vocabulary) -> np.ndarray:
        if self.mask_fraction == 1.0:
            return np.full_like(labels_N, vocabulary.mask_id)
        ordinary = vocabulary.ordinary_ids
        random_N = ordinary[(which_N * len(ordinary)).astype(np.int64)]
        unmasked_N = np.where(how_N < self.mask_fraction + self.random_fraction, random_N, labels_N)
        return np.where(how_N < self.mask_fraction, vocabulary.mask_id, unmasked_N)
