"""What one step, or one evaluation, is to do: handed from the plan, which knows no megatron.core, to the trainer."""

from dataclasses import dataclass

from megatron_encdec.data.samples import Samples
from megatron_encdec.model.rope import Rope
from megatron_encdec.objectives.base import Objective


@dataclass(frozen=True)
class Work:
    """What a step or an evaluation reads and how. micro_size: windows of a micro-batch; rope: None for the model's."""

    samples: Samples
    objective: Objective
    numbers: range
    micro_size: int
    rope: Rope | None = None
