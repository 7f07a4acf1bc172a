"""What a phase trains for: a sample becomes inputs, labelled positions and an attention kind. Pure numpy.

    base.py          the contract of an objective, and `OBJECTIVES`, all of them by name
    vocabulary.py    what they know of the tokenizer
    clm.py, mlm.py   one file an objective: a file put beside these is found by itself
    microbatch.py    several labelled windows as the arrays of one forward pass
"""

import importlib
import pkgutil

from megatron_encdec.objectives.base import OBJECTIVES, AttentionKind, Labelled, Objective, evaluated, of_attention
from megatron_encdec.objectives.microbatch import MicroBatch, collate
from megatron_encdec.objectives.vocabulary import Vocabulary

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OBJECTIVES", "AttentionKind", "Labelled", "MicroBatch", "Objective", "Vocabulary", "collate", "evaluated",
           "of_attention"]
