"""A model directory that `export` wrote: what its own record says of it."""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.interop.export import RECORD
from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.source_files import read_object
from megatron_encdec.platform.errors import UserError


@dataclass(frozen=True)
class Exported:
    """`path` holds a `model_class` of stock transformers, from step `step` of a run. attention: `causal` or
    `bidirectional`. difference: the largest one between its logits and the run's, None where it was not made now."""

    path: Path
    model_class: str
    attention: str
    dtype: str
    step: int
    difference: float | None = None

    @classmethod
    def read(cls, directory: str | os.PathLike, difference: float | None = None) -> "Exported":
        """From export.json in `directory`. Raises `UserError` where it cannot be read."""
        record = read_object(Path(directory) / RECORD)
        if record.get("as") not in TARGETS:
            raise UserError(f"{directory}: no export of ours (it has no {RECORD} that names one)")
        target = TARGETS[record["as"]]
        return cls(Path(directory), target.model_class, target.attention, record["dtype"], record["step"], difference)

    def __str__(self) -> str:
        compared = "was there already" if self.difference is None else \
            f"logits differ from the trunk's by at most {self.difference:.2g}"
        return (f"{self.path}: {self.model_class}, {self.attention} attention, {self.dtype}, step {self.step}; "
                f"{compared}")
