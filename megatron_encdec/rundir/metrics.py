"""metrics.jsonl: one JSON object a line, floats at full precision, cut back to the checkpoint at resume."""

import json
import os
from pathlib import Path

from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.rundir.files import write_atomic


class MetricsLog:
    """Append-only log of one run; only the rank that writes metrics opens one."""

    def __init__(self, path: Path, resume_step: int):
        """Continue `path`, without the lines of steps after `resume_step` (they will be written again)."""
        self.path = path
        kept = [line for line in read_metrics(path, torn_tail=True) if line.get("step", 0) <= resume_step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (held open for the run)

    def write(self, kind: str, **values) -> None:
        """Add a line of `kind`: train, eval, phase, checkpoint or resume."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make everything written so far durable; called before a checkpoint is taken."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make durable and close."""
        self.sync()
        self._file.close()


def read_metrics(path: Path, torn_tail: bool = False) -> list[dict]:
    """All lines; a last line that a crash cut short is left out if `torn_tail`, else refused."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if torn_tail and number == len(lines):
                break
            raise IntegrityError(f"{path}:{number}: not a JSON line; remove it to go on") from None
    return records
