"""run_state.json of a checkpoint: where a run stood, what determined that state, and what wrote it."""

import json
import platform as python_platform
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_encdec import __version__
from megatron_encdec.engine import integrity
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.errors import IntegrityError, UserError

FORMAT = 2  # of a checkpoint; 1 had no checksums


@dataclass(frozen=True)
class RunState:
    """The state after `step`; samples, tokens and targets are those consumed so far, over all phases.
    phase: its number, from 0. history: what determined this state (training/stretches.py), history_hash its sha256.
    skipped: steps without an update. metrics_position: how long metrics.jsonl was (rundir/metrics.py).
    imported: what an import noted of its source."""

    step: int
    phase: int
    phase_name: str
    objective: str
    samples: int
    tokens: int
    targets: int
    history_hash: str
    history: dict[str, Any]
    data_fingerprints: list[str]
    tokenizer_fingerprint: str | None
    topology: dict[str, Any]
    versions: dict[str, str]
    skipped: int = 0
    metrics_position: dict[str, int] | None = None
    imported: dict[str, Any] | None = None
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "imported" or value is not None}


def read_run_state(checkpoint: Path) -> RunState:
    """run_state.json of `checkpoint`. Raises `IntegrityError` where it is missing or damaged."""
    path = checkpoint / "run_state.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not checkpoint.exists():
            raise integrity.gone(checkpoint) from None
        raise IntegrityError(f"{path}: missing; this checkpoint is not whole") from None
    except ValueError as error:  # not JSON, or not even text
        raise IntegrityError(f"{path}: not valid JSON ({error}); this checkpoint is damaged") from None
    recorded = found.get("format") if isinstance(found, dict) else None
    if recorded != FORMAT:
        raise UserError(f"{path}: checkpoint format {recorded!r}; this version reads {FORMAT}")
    if missing := [field.name for field in fields(RunState) if field.default is MISSING and field.name not in found]:
        raise IntegrityError(f"{path}: has no {', '.join(missing)}; this checkpoint is damaged")
    return RunState(**{field.name: found[field.name] for field in fields(RunState) if field.name in found})


def versions() -> dict[str, str]:
    """Package versions that bit-equality depends on."""
    return {"megatron_encdec": __version__, "torch": torch.__version__, "megatron_core": mcore.__version__,
            "numpy": numpy.__version__, "python": python_platform.python_version()}
