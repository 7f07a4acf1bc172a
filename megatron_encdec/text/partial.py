"""`PREFIX.partial/`: everything of a preprocessing run that is not finished, so that the same command continues it.

    lock            held while a process works on this output
    plan.json       inputs, tokenizer and settings: another plan starts over
    journal.jsonl   one line a finished chunk: its account, with the sha256 of its ids
    train.bin ...   the output so far, chunk after chunk; see `text/indexed.py`
    ids-*, block-*  chunks under way

    1. `PartialRun(prefix, plan)`   locks the folder; `resumed` says whether it holds this very plan
    2. `finished_chunks()`          the journal, without a last line that a crash cut short
    3. `record(account)`            a line more
    4. `remove()`                   at the end

A chunk is recorded after its ids are appended, so behind the recorded ones the files may hold more, never less:
after kill -9 the rest is cut off. After a power failure they may hold anything; the hashes tell.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Self

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_json_atomic


class PartialRun:
    """The folder of the unfinished run of `prefix`; a context manager that holds its lock.

    Raises `UserError` if the place cannot be written or another process is writing the same output.
    """

    def __init__(self, prefix: str | Path, plan: dict):
        self.folder = Path(f"{prefix}.partial")
        self._plan = json.loads(json.dumps(plan))
        self._stack = contextlib.ExitStack()
        self._journal = None
        self.resumed = False

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self._stack.enter_context(open(self.folder / "lock", "ab"))
            _take(lock, self.folder)
            self.resumed = self._read_plan() == self._plan
            if not self.resumed:
                self._empty()
                write_json_atomic(self.folder / "plan.json", self._plan)
            self._journal = self._stack.enter_context(open(self.folder / "journal.jsonl", "ab"))
        except OSError as error:
            self._stack.close()
            raise UserError(f"{self.folder}: cannot write the output: {error.strerror}") from None
        except UserError:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def finished_chunks(self) -> list[dict]:
        """The journal's records in order."""
        records = []
        for line in (self.folder / "journal.jsonl").read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                break  # cut short, or the end
            if record.get("number") != len(records):
                break
            records.append(record)
        return records

    def keep_records(self, records: list[dict]) -> None:
        """Make `records` the whole journal, and take away what chunks under way have left."""
        self._journal.truncate(0)
        for record in records:
            self.record(record)
        for entry in self.folder.iterdir():
            if entry.name.startswith(("ids-", "block-")):
                entry.unlink()

    def record(self, record: dict) -> None:
        """Add a finished chunk; it outlives this process from here on."""
        self._journal.write(json.dumps(record).encode() + b"\n")
        self._journal.flush()

    def remove(self) -> None:
        """Take the folder away: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_plan(self):
        try:
            return json.loads((self.folder / "plan.json").read_bytes())
        except (OSError, ValueError):
            return None

    def _empty(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                entry.unlink()


def _take(lock, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"{folder}: another process is writing this output; wait for it, or name another "
                            "--output") from None
        return  # a file system without locks
    if not folder.exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
        raise UserError(f"{folder}: another process has just written this output; run again")
