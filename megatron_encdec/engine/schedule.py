"""The learning rate of a step, as a pure function: nothing to save, nothing to drift.

Step numbers count optimizer updates from 1. Warm-up is linear from 0; `wsd` stays at the peak and goes down
linearly over its last `decay_steps`; `cosine` goes down from the end of the warm-up to the last step.
The paper: 2 000 steps up, stable at 5e-4, the last 2 000 of 42 000 down to 0, one schedule over all phases.
"""

import math

from megatron_encdec.engine.config import ScheduleSettings


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleSettings) -> float:
    """Learning rate used by update number `step` (1 .. total_steps)."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    low = schedule.final_lr
    if schedule.name == "wsd":
        remaining = total_steps - step
        if remaining < schedule.decay_steps:
            return low + (peak - low) * remaining / schedule.decay_steps
    elif schedule.name == "cosine":
        done = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak
