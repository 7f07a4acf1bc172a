"""`--profile 10` or `--profile 10..12`: a torch profiler trace of chosen steps, under `profile/` of the run directory.

Every rank writes steps_10-12.rank0.json.gz (for chrome://tracing or Perfetto) and .txt, the costs by operator. Profiled
steps are slower, and so are their speeds in the log; their numbers are the same.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_encdec.platform.device import device_type
from megatron_encdec.platform.errors import UserError

_STEPS = re.compile(r"(\d+)(?:(?:\.\.|-)(\d+))?")
_ROWS = 40  # operators in the table


def steps_of(text: str | None) -> range:
    """The steps of `10` or `10..12` (both ends included); of None, none."""
    if text is None:
        return range(0)
    match = _STEPS.fullmatch(text)
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else 0
    if not 1 <= first <= last:
        raise UserError(f"--profile {text}: write a step or a range of steps, like 10 or 10..12")
    return range(first, last + 1)


class Profiler:
    """Records `steps` (empty: nothing at all) into `directory`, and says where with `say`."""

    def __init__(self, steps: range, directory: Path, rank: int, say: Callable[[str], None]):
        self._steps, self._rank, self._directory, self._say = steps, rank, directory, say
        self._profile: torch.profiler.profile | None = None
        self._begun = 0

    def after(self, step: int) -> None:
        """Step `step` is done (0, or where a run goes on, before the first)."""
        if self._profile is not None and step == self._steps[-1]:
            self.close(step)
        if self._profile is None and step + 1 in self._steps:
            known = torch.profiler.ProfilerActivity
            activities = [known.CPU, known.CUDA] if device_type() == "cuda" else [known.CPU]
            self._profile, self._begun = torch.profiler.profile(activities=activities), step + 1
            self._profile.start()

    def close(self, step: int) -> None:
        """Write what was recorded up to `step`, if anything."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        if device_type() == "cuda":
            torch.cuda.synchronize()
        profile.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        stem = self._directory / f"steps_{self._begun}-{step}.rank{self._rank}"
        profile.export_chrome_trace(f"{stem}.json.gz")
        by = "self_cuda_time_total" if device_type() == "cuda" else "self_cpu_time_total"
        Path(f"{stem}.txt").write_text(profile.key_averages().table(sort_by=by, row_limit=_ROWS) + "\n")
        self._say(f"profile of steps {self._begun}..{step}: {stem}.json.gz")
