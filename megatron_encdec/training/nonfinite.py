"""Bad numbers: a loss, gradient norm or weight that is nan or infinite never reaches the weights or a checkpoint.

A step that is skipped changes no weight, moment or update count; its samples and its place in the schedule are
used up. `run.max_skipped` limits the skips of the whole run; the count is part of a checkpoint.
"""

import math

import torch

from megatron_encdec.platform.distributed import Control
from megatron_encdec.platform.errors import RunFailed
from megatron_encdec.training.config import RunSettings
from megatron_encdec.training.step import BadGradients, Share, StepResult, named


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def blamed(found: list[BadGradients]) -> list[tuple[int, tuple[str, ...], str]]:
    """The ranks that a gradient which is not finite came from: rank, its parameters, and both in words. Where none is
    seen to have made one, it is a rank in whose part of the sum it stands: its own gradient was never seen alone."""
    made, blame = {one.place for one in found if one.own}, []
    for one in found:
        if one.own or (one.summed and one.place not in made):
            names, perhaps = one.own or one.summed, "" if one.own else ", or the sum over the ranks that it holds"
            more = f" and {len(names) - 1} parameter{'s' * (len(names) > 2)} before it" if len(names) > 1 else ""
            blame.append((one.rank, names, f"the gradient of {names[-1]}{more} (rank {one.rank}{perhaps})"))
    return blame


def _first_and_last(part: Share) -> dict:
    """The sample numbers of a micro-batch for the metrics; all of them where they do not follow one another."""
    numbers = [number for number in part if number is not None]
    ends = [numbers[0], numbers[-1]]
    return {"samples": ends} | ({} if ends[1] - ends[0] + 1 == len(numbers) else {"sample_numbers": numbers})


class Guard:
    """Applies `run.on_nonfinite`; made on all ranks, and asked by all in the same order."""

    def __init__(self, control: Control, settings: RunSettings):
        self._control, self._policy, self._limit = control, settings.on_nonfinite, settings.max_skipped

    def judge(self, step: int, result: StepResult, skipped: int) -> dict | None:
        """None for a good step, else what the metrics say of the skipped one; collective on a bad step.
        skipped: steps of this run skipped before it. Raises `RunFailed` under `stop`, and after too many skips."""
        if result.finite:
            return None
        skipped, samples = skipped + 1, result.samples
        everyones = self._control.gathered((result.bad, result.gradients))
        found = [bad for one, _ in everyones for bad in one]
        gradients = blamed([one for _, one in everyones if one is not None])
        where = "; ".join([f"samples {named(part)} (rank {rank}, micro-batch {number})"
                           for rank, number, part in found] + [line for _, _, line in gradients][:8])
        where = where or "no micro-batch's loss and no parameter's gradient: their sums are too large"
        what = (f"step {step}: loss {_shown(result.loss)}, gradient norm {_shown(result.grad_norm)}, on samples "
                f"{samples.start}..{samples.stop - 1}; first seen in {where}")
        if self._policy == "stop":
            raise RunFailed(f"{what}. The weights are those of step {step - 1}; nothing was saved of this one. "
                            "Continue with run.on_nonfinite=skip to leave such steps out, or fork an earlier step with "
                            "a lower optimizer.lr (--fork RUN@STEP)")
        if skipped > self._limit:
            raise RunFailed(f"{what}. It would be skipped step number {skipped}, and run.max_skipped={self._limit}. "
                            "Nothing was saved of it; fork an earlier step with a lower optimizer.lr (--fork RUN@STEP)")
        return {"loss": _shown(result.loss), "grad_norm": _shown(result.grad_norm),
                "samples": [samples.start, samples.stop - 1], "skipped": skipped,
                "seen": [{"rank": rank, "micro_batch": number, **_first_and_last(part)}
                         for rank, number, part in found],
                "gradients": [{"rank": rank, "parameters": list(names)} for rank, names, _ in gradients]}

    @torch.no_grad()
    def check_weights(self, trunk, step: int) -> None:
        """Raise `RunFailed` where a weight is not finite; collective."""
        bad = [name for name, weight in trunk.named_parameters() if not math.isfinite(float(weight.sum().float()))
               and not bool(torch.isfinite(weight).all())]
        if self._control.highest(len(bad)):
            named = [f"{name} (rank {rank})" for rank, names in enumerate(self._control.gathered(bad[:3]))
                     for name in names]
            raise RunFailed(f"step {step}: its update made weights nan or infinite: {', '.join(named[:6])}. Nothing "
                            "was saved of this step; the checkpoint before it is untouched. Fork it with a lower "
                            "optimizer.lr (--fork RUN@STEP)")
