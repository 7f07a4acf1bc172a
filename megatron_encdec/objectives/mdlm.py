"""Masked diffusion: MLM at a ratio that is drawn anew for each sample, weighted so that the loss bounds the likelihood.

    1. Draw t uniformly from [0.001, 1) for the sample, from the stream of (data.seed, sample number).
    2. Hide each ordinary token with the probability t, by MLM's own draws: masks are nested across t and paired with
       those of MLM. Always the mask token; special tokens never.
    3. The loss of a hidden token has the weight 1 / t, and the sum is divided by the number of tokens that could have
       been hidden: an upper bound of the negative log-likelihood a token.

Rule: MDLM, arXiv 2406.07524, the bound in continuous time with the log-linear schedule, whose weight is 1 / t. Unlike
there, the t of a batch are drawn independently: a sample's mask must not depend on its neighbours.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_encdec.data.draws import uniforms
from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import AttentionKind, Labelled, Objective, Vocabulary
from megatron_encdec.objectives.masking import ordinary

SMALLEST_TIME = 1e-3


@dataclass(frozen=True)
class MDLM(Objective):
    """Masked tokens, seen from both sides, at every ratio."""

    name: ClassVar[str] = "mdlm"
    attention: ClassVar[AttentionKind] = "bidirectional"
    hides: ClassVar[bool] = True

    def apply(self, sample: Sample, data_seed: int, vocabulary: Vocabulary) -> Labelled:
        """Labels of the hidden tokens, of equal weights; the window's weight is its number of ordinary tokens."""
        tokens_S, maskable_S = sample.tokens_S, ordinary(sample, vocabulary)
        time = diffusion_time(data_seed, sample.index)
        chosen_S = uniforms(data_seed, "mask", sample.index, len(tokens_S))
        hidden_N = np.flatnonzero((chosen_S < time) & maskable_S)
        inputs_S = tokens_S.copy()
        inputs_S[hidden_N] = vocabulary.mask_id
        return Labelled(inputs_S, hidden_N, tokens_S[hidden_N], np.full(len(hidden_N), 1 / time, np.float32),
                        int(maskable_S.sum()))


def diffusion_time(data_seed: int, index: int) -> float:
    """The ratio t of sample `index`."""
    return SMALLEST_TIME + (1 - SMALLEST_TIME) * float(uniforms(data_seed, "diffusion time", index, 1)[0])
