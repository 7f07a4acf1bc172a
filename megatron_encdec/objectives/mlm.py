"""Masked language modelling: hide some tokens and predict each at its own position (unshifted).

Rule: arXiv 2507.00994 (i.i.d. masking, always the mask token, special tokens never masked). What is masked, and how,
is said in masking.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_encdec.objectives.base import AttentionKind
from megatron_encdec.objectives.masking import Masking


@dataclass(frozen=True)
class MLM(Masking):
    """Masked tokens, seen from both sides."""

    name: ClassVar[str] = "mlm"
    attention: ClassVar[AttentionKind] = "bidirectional"
    yardstick: ClassVar[bool] = True
