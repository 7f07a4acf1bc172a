"""What a phase trains for: a sample becomes inputs, labelled positions and an attention kind. Pure numpy.

    base.py          the contract of an objective, and `OBJECTIVES`, all of them by name; `Vocabulary`
    clm.py, mlm.py   one file an objective: a file put beside these is found by itself
    microbatch.py    several labelled windows as the arrays of one forward pass
"""

import importlib
import pkgutil

from megatron_encdec.objectives.base import (
    OBJECTIVES,
    AttentionKind,
    Labelled,
    Objective,
    Vocabulary,
    evaluated,
    of_attention,
)
from megatron_encdec.objectives.microbatch import MicroBatch, collate

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OBJECTIVES", "Labelled", "MicroBatch", "Objective", "Vocabulary", "collate", "evaluated", "of_attention"]
