"""Masked next token prediction: a hidden token is predicted by the output one position before it, seen from both sides.

So the head reads what it reads in causal language modelling, which is how a decoder is adapted to bidirectional
attention: LLM2Vec, arXiv 2404.05961, section 2, at 20 % for Llama 2 (mntp:0.2). Masks are those of MLM (masking.py)
but for the first token of a segment, which has no output before it, and with whole words a segment's first word.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import AttentionKind, Vocabulary
from megatron_encdec.objectives.masking import Masking, starts_of_segments


@dataclass(frozen=True)
class MNTP(Masking):
    """Masked tokens, each predicted from the position before it."""

    name: ClassVar[str] = "mntp"
    attention: ClassVar[AttentionKind] = "bidirectional"
    predicts: ClassVar[int] = 1

    def maskable(self, sample: Sample, vocabulary: Vocabulary) -> np.ndarray:
        maskable_S = super().maskable(sample, vocabulary)
        maskable_S[starts_of_segments(sample)] = False
        return maskable_S
