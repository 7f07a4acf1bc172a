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

from functools import cached_property

import numpy as np

from megatron_encdec.data.draws import uniforms
from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import AttentionKind, Labelled
from megatron_encdec.platform.errors import UserError


class MLM:
    """Masked tokens, bidirectional attention."""

    name = "mlm"
    attention: AttentionKind = "bidirectional"

    def __init__(self, mask_ratio: float, mask_id: int, special_ids: list[int], vocabulary_size: int,
                 mask_fraction: float = 1.0, random_fraction: float = 0.0):
        """Choose `mask_ratio` of the tokens that are not in `special_ids` (`mask_id` always counts as one).

        Of the chosen, `mask_fraction` become `mask_id`, `random_fraction` an ordinary token drawn uniformly
        from the vocabulary, the rest stay as they are; all of them are predicted.
        """
        special = sorted({mask_id, *special_ids})
        if special[0] < 0 or special[-1] >= vocabulary_size:
            raise UserError(f"tokenizer: special token ids {special[0]}..{special[-1]} are outside its "
                            f"vocabulary of {vocabulary_size}")
        if len(special) == vocabulary_size:
            raise UserError(f"tokenizer: all {vocabulary_size} tokens are special, none can be masked")
        self.mask_ratio, self.mask_fraction, self.random_fraction = mask_ratio, mask_fraction, random_fraction
        self.mask_id, self.vocabulary_size = mask_id, vocabulary_size
        self._ordinary_V = np.ones(vocabulary_size, dtype=bool)
        self._ordinary_V[special] = False

    def apply(self, sample: Sample, data_seed: int) -> Labelled:
        """Labels at the chosen positions only: none where the window holds special tokens alone."""
        tokens_S = sample.tokens_S
        chosen_S, how_S, which_S = uniforms(data_seed, "mask", sample.index, 3 * len(tokens_S)).reshape(3, -1)
        try:
            ordinary_S = self._ordinary_V[tokens_S]
        except IndexError:
            raise UserError(f"sample {sample.index} holds token id {tokens_S.max()}, outside the tokenizer's "
                            f"vocabulary of {self.vocabulary_size}: the data was written with another "
                            "tokenizer") from None
        positions_N = np.flatnonzero((chosen_S < self.mask_ratio) & ordinary_S)
        labels_N = tokens_S[positions_N]
        inputs_S = tokens_S.copy()
        inputs_S[positions_N] = self._hide(labels_N, how_S[positions_N], which_S[positions_N])
        return Labelled(inputs_S, positions_N, labels_N)

    def _hide(self, labels_N: np.ndarray, how_N: np.ndarray, which_N: np.ndarray) -> np.ndarray:
        if self.mask_fraction == 1.0:
            return np.full_like(labels_N, self.mask_id)
        random_N = self._ordinary_ids[(which_N * len(self._ordinary_ids)).astype(np.int64)]
        unmasked_N = np.where(how_N < self.mask_fraction + self.random_fraction, random_N, labels_N)
        return np.where(how_N < self.mask_fraction, self.mask_id, unmasked_N)

    @cached_property
    def _ordinary_ids(self) -> np.ndarray:
        return np.flatnonzero(self._ordinary_V)
