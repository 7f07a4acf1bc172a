"""metrics.jsonl: one JSON object a line, floats at full precision, cut back to the checkpoint at resume.

A checkpoint's run_state.json records how long the file was, and durable, when the state was taken
(`metrics_position`). A run that goes on from there cuts the file back to that length: every line of the steps up to
the checkpoint is there once, those of later steps are put aside (in ASIDE) and written again. `checkpoint` lines are
written when a save is finished, later than its step: those of steps that stay are kept.

    1. `MetricsLog(path, step, position)`     continue, cut back to `step`
    2. `write`, `sync`, `position`, `close`
    3. `read_metrics(path)`                   all lines
    4. `recorded(path)`                       how far a run came and what it saved, by its lines
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.platform.json_text import json_text
from megatron_encdec.rundir.files import flush_to_disk, write_atomic

ASIDE = "metrics.aside.jsonl"  # lines of steps that were done again, added by each launch that cut some off


class MetricsLog:
    """Append-only log of one run; only the rank that writes metrics opens one. notes: what a person should know of the
    file that was found. checkpoint_steps: of the `checkpoint` lines that it begins with; one is missing where the
    process was killed between a save and its line."""

    def __init__(self, path: Path, resume_step: int | None = None, position: dict | None = None):
        """Continue `path` after `resume_step`, whose checkpoint recorded `position` (None: cut by step numbers).

        A run that begins, or a fork, gives neither: lines that are there belong to a launch that saved nothing.
        Raises `IntegrityError` where a line that has to be read is none, OSError where the files cannot be written.
        """
        self.path, self.notes = path, []
        data = _read(path)
        kept = b"" if resume_step is None else self._kept(data, resume_step, position)
        self._put_aside(data, kept, resume_step)
        if kept != data or not path.exists():
            write_atomic(path, kept)
        # held open for the run; the buffer keeps lines while a disk is full
        self._file = open(path, "ab", buffering=1 << 24)  # noqa: SIM115
        self._bytes, self._lines = len(kept), kept.count(b"\n")
        self.checkpoint_steps = {record.get("step") for _, record in _lines(path, kept, strict=False)
                                 if record.get("kind") == "checkpoint"}

    def write(self, kind: str, **values) -> None:
        """Add a line of `kind`: train, eval, phase, checkpoint or resume; NaN is null there. Raises OSError where the
        disk takes nothing; the line is kept and written with the next one that it takes."""
        line = json_text({"kind": kind, **values}).encode() + b"\n"
        self._bytes += len(line)
        self._lines += 1
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        """Make everything written so far durable; called before a checkpoint is taken."""
        flush_to_disk(self._file)

    @property
    def position(self) -> dict:
        """How long the file is, for run_state.json's `metrics_position`; `sync` first."""
        return {"bytes": self._bytes, "lines": self._lines}

    def close(self) -> None:
        """Make durable and close."""
        self.sync()
        self._file.close()

    def _kept(self, data: bytes, step: int, position: dict | None) -> bytes:
        if position is None:
            lines = _lines(self.path, data, strict=True)
            return b"".join(line for line, record in lines if record.get("step", 0) <= step)
        size = position["bytes"]
        head = data[:size]
        if len(head) < size or head.count(b"\n") != position["lines"] or (size and not head.endswith(b"\n")):
            self.notes.append(f"{self.path}: lines before step {step} were lost or altered: its checkpoint recorded "
                              f"{size} bytes in {position['lines']} lines, and they are not there")
            return self._kept(data, step, None)
        later = [line for line, record in _lines(self.path, data[size:], strict=False)
                 if record.get("kind") == "checkpoint" and record.get("step", 0) <= step]
        return head + b"".join(later)

    def _put_aside(self, data: bytes, kept: bytes, step: int | None) -> None:
        """Add the whole lines of `data` that are not among `kept` to ASIDE; they are durable there first."""
        cut = list((Counter(data.split(b"\n")[:-1]) - Counter(kept.split(b"\n")[:-1])).elements())
        if not cut:
            return
        with open(self.path.with_name(ASIDE), "ab") as file:
            file.write(b"".join(line + b"\n" for line in cut))
            flush_to_disk(file)
        whose = "of a launch that saved nothing" if step is None else f"after step {step}"
        self.notes.append(f"{self.path}: {len(cut)} lines {whose} are put aside in {ASIDE}; their steps are done again")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror}); move it away to go on without") from None


def _lines(path: Path, data: bytes, strict: bool) -> list[tuple[bytes, dict]]:
    """The lines of `data`, ends included, with what they say. A torn last line is left out; any other that is not
    JSON is left out too or, if `strict`, refused."""
    lines, kept = data.split(b"\n"), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line else None
        except ValueError:
            if strict and number < len(lines):
                raise IntegrityError(f"{path}:{number}: not a JSON line; remove it to go on") from None
            continue
        if isinstance(record, dict):
            kept.append((line + b"\n", record))
    return kept


def read_metrics(path: Path, torn_tail: bool = False, needed: Mapping[str, Mapping[str, tuple]] | None = None
                 ) -> list[dict]:
    """All lines; a last line that a crash cut short is left out if `torn_tail`, else refused. needed: of lines of some
    kinds the fields that have to be there, with the types that they may have; without one of them a line is refused."""
    data = _read(path)
    if not torn_tail and data and not data.endswith(b"\n"):
        data += b"\n"  # so that the last line is one like any other
    lines = _lines(path, data, strict=True)
    for line, record in lines if needed else ():
        for name, types in needed.get(str(record.get("kind")), {}).items():
            if type(record.get(name, ...)) not in types:
                found = f"{name} is {record[name]!r}" if name in record else f"it has no {name}"
                number = data.split(b"\n").index(line.rstrip(b"\n")) + 1
                raise IntegrityError(f"{path}:{number}: a damaged line of the kind {record['kind']} ({found}); bring "
                                     "the file back, or remove the line to look at the rest")
    return [record for _, record in lines]


def recorded(path: Path) -> tuple[int, list[int]]:
    """The last step with a line, 0 without one, and the steps that were saved; lines that are none are left out."""
    records = [record for _, record in _lines(path, _read(path), strict=False)]
    steps = [record.get("step", 0) for record in records]
    saved = [step for step, record in zip(steps, records, strict=True)
             if record.get("kind") == "checkpoint" and "error" not in record]
    return max(steps, default=0), saved
