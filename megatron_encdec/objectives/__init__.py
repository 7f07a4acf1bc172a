"""What a phase trains for: a sample becomes inputs, labelled positions and an attention kind. Pure numpy.

    config -> build_objective -> clm | mlm -> collate -> MicroBatch

An objective is the only thing a phase changes; it has no state, so the switch has nothing to carry.
"""

from megatron_encdec.objectives.base import Labelled, Objective
from megatron_encdec.objectives.build import build_objective
from megatron_encdec.objectives.config import OBJECTIVES, ObjectiveConfig
from megatron_encdec.objectives.microbatch import MicroBatch, collate

__all__ = ["OBJECTIVES", "Labelled", "MicroBatch", "Objective", "ObjectiveConfig", "build_objective", "collate"]
