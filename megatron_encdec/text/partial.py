"""`PREFIX.partial/`: everything of a preprocessing run that is not finished, so that the same command continues it.

    run.lock        held while a process works on this output
    plan.json       inputs, tokenizer and settings: a folder with finished chunks of another plan is refused
    journal         one line a finished chunk: the line's own sha256, its account with the sha256 of its ids
    train.bin ...   the output so far, chunk after chunk; see `text/indexed.py`
    ids-*, block-*  chunks under way
    finished.json   the manifests, while the finished files get their names

    1. `PartialRun(prefix, plan)`      locks the folder; `resumed` says whether it holds this very plan
    2. `finished_chunks()`             the journal, without a last line that a crash cut short
    3. `check()`, `record(...)`        whether the lock is still ours, before ids are appended; a line more
    4. `publish(prefixes, written)`    finished files get their names, manifests last; `left_to_publish` after a crash
    5. `remove()`                      at the end; `remove_left(prefix, plan)` where a run was killed just before that

`Tally` makes a journal's line of a worker's account, and sums the lines: nothing is lost between input and manifest. A
chunk is recorded after its ids are appended, so after the recorded ones the files may hold more, never less: after
kill -9 the rest is cut off. After a power failure they may hold anything; the hashes tell. Each step of `publish`
leaves what an earlier attempt has done as it is, so that the same call finishes it. Never does a manifest stand beside
files of another run, nor an old validation split beside new training data.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Self

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import build, to_dict
from megatron_encdec.rundir.files import fsync_directory, replace_durably, write_json_atomic
from megatron_encdec.rundir.lineage import differences
from megatron_encdec.rundir.lock import NAME as LOCK
from megatron_encdec.rundir.lock import FolderLock
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.chunks import Chunk, ChunkAccount
from megatron_encdec.text.indexed import bin_path, idx_path
from megatron_encdec.text.manifest import SUMMED, TRAIN, Manifest, Skipped

SHOWN = 3  # differences of two plans


class PartialRun:
    """The folder of the unfinished run of `prefix`; a context manager that holds its lock. `resumed`: it is of this
    very plan; `outdated`: chunks that were finished from inputs which have changed since, and are done again. Raises
    `UserError` if the place cannot be written, if another process is writing the same output, or if chunks are finished
    there that are not of `plan`: hours of work, perhaps, which only the user may give up."""

    def __init__(self, prefix: str | Path, plan: dict):
        self.folder = Path(f"{prefix}.partial")
        self.plan = json.loads(json.dumps(plan))
        self._finished = self.folder / "finished.json"
        self.resumed, self.outdated = False, 0

    @property
    def is_publishing(self) -> bool:
        """Whether a run was killed while its files got their names."""
        return self._finished.exists()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            try:
                self._claim = stack.enter_context(FolderLock(self.folder, "--output")).claim
                self.resumed = self.read_plan() == self.plan
                if not self.resumed:
                    self._refuse_others_work()
                    for entry in self.folder.iterdir():
                        if entry.name != LOCK:
                            entry.unlink()
                    write_json_atomic(self.folder / "plan.json", self.plan)
                self._journal = stack.enter_context(open(self.folder / "journal", "ab"))
            except OSError as error:
                raise UserError(f"{self.folder}: cannot write the output: {error.strerror}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def check(self) -> None:
        """Raises `InUse` where another process has taken the folder meanwhile."""
        self._claim.check()

    def read_plan(self) -> dict | None:
        """The plan of the run whose folder this is, None where there is none."""
        try:
            return json.loads((self.folder / "plan.json").read_bytes())
        except (OSError, ValueError):
            return None

    def finished_chunks(self) -> list[dict]:
        """The journal's records in order, up to a line that is not as it was written."""
        records, journal = [], self.folder / "journal"
        for line in (journal.read_bytes() if journal.exists() else b"").split(b"\n"):
            digest, _, content = line.partition(b" ")
            if digest != hashlib.sha256(content).hexdigest().encode():
                break  # cut short, altered, or the end
            records.append(json.loads(content))
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
        content = json.dumps(record).encode()
        self._journal.write(hashlib.sha256(content).hexdigest().encode() + b" " + content + b"\n")
        self._journal.flush()

    def publish(self, prefixes: Mapping[str, Path], written: Mapping[str, Manifest]) -> None:
        """Give NAME.bin and NAME.idx of the folder, all on disk already, their names, for each NAME in `prefixes`."""
        self.check()
        write_json_atomic(self._finished, {name: to_dict(manifest) for name, manifest in written.items()})
        waiting = [prefix for name, prefix in prefixes.items() if bin_path(self.folder / name).exists()]
        for path in [path(prefix) for path in (manifests.manifest_path, idx_path) for prefix in waiting]:
            path.unlink(missing_ok=True)  # now no crash can pair an old file with a new one
            fsync_directory(path.parent)
        for name, prefix in prefixes.items():
            for path in (bin_path, idx_path):
                if path(self.folder / name).exists():
                    replace_durably(path(self.folder / name), path(prefix))
            (self.folder / f"{name}.lengths").unlink(missing_ok=True)
        for name in reversed(list(prefixes)):
            manifests.write(manifests.manifest_path(prefixes[name]), written[name])

    def left_to_publish(self, prefixes: Mapping[str, Path]) -> dict[str, Manifest] | None:
        """What an interrupted `publish` of this very plan still has to do; None if nothing, or if files are missing."""
        try:
            content = json.loads(self._finished.read_bytes())
            written = {name: build(Manifest, content[name]) for name in prefixes}
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None
        for name, prefix in prefixes.items():
            for path, size in ((bin_path, written[name].bin_bytes), (idx_path, written[name].idx_bytes)):
                places = [one for one in (path(self.folder / name), path(prefix)) if one.exists()]
                if not places or places[0].stat().st_size != size:
                    return None
        return written if self.resumed else None

    def remove(self) -> None:
        """Take the folder away. The journal goes first: without it nothing left behind counts as unfinished work."""
        self.check()
        (self.folder / "journal").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_others_work(self) -> None:
        chunks, theirs = len(self.finished_chunks()), self.read_plan()
        if not chunks:
            return
        if isinstance(theirs, dict) and _without_times(theirs) == _without_times(self.plan):
            self.outdated = chunks
            return
        what, keep = "and its plan.json is missing or damaged, so that nobody knows of which inputs and settings", ""
        if isinstance(theirs, dict):
            lines = sorted(differences(theirs, self.plan), key=lambda line: line.startswith("inputs"))  # may be many
            lines = [shorten(line, 200, placeholder=" ...") for line in lines]
            more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
            what = f"of another run (begun with -> asked for): {'; '.join(lines[:SHOWN])}{more}"
            keep = "give it the inputs and settings that it was begun with to go on, "
        raise UserError(f"{self.folder}: holds {chunks} finished chunks, {what}; {keep}name another --output, or "
                        "delete that folder to start over")


def _without_times(plan: dict) -> dict:
    """A plan without sizes and times of its inputs: of files that were changed in place since, nothing can be kept."""
    return plan | {"inputs": [record.get("path") for record in plan.get("inputs", [])]}


def remove_left(prefix: str | Path, plan: dict) -> None:
    """Take the folder away that a run of this plan left which was killed when its output was complete. Without a plan
    it was killed in `remove`; finished chunks without one stay."""
    left = PartialRun(prefix, plan)
    if left.folder.exists() and left.read_plan() in (left.plan, None):
        with contextlib.suppress(UserError), left:
            left.remove()


class Tally:
    """Sums over finished chunks: `chunks`, `consumed` (bytes on disk), `bytes_in` (decompressed), `unproven`. With
    `on_error` "stop" the first document that cannot be used ends the run."""

    def __init__(self, splits: Iterable[str], on_error: str = "count"):
        self.chunks = self.consumed = self.bytes_in = self.unproven = 0
        self._line = 0  # of the file under way, where the next chunk begins
        self._stop = on_error == "stop"
        self._splits = {split: dict.fromkeys(SUMMED, 0) for split in splits}
        self._skipped: dict[str, Skipped] = {}

    def named(self, account: ChunkAccount, chunk: Chunk) -> dict:
        """`account` as plain data, its examples as "file:line"; `line` is where the next chunk's lines begin."""
        base = 0 if chunk.first else self._line

        def place(file: int, line: int) -> str:
            return f"{chunk.names[file]}:{line + (0 if chunk.kind == 'texts' else base)}"

        record = asdict(account) | {"line": base + account.lines}
        del record["lengths"]
        record["skipped"] = {reason: (count, size, [place(*where) for where in first])
                             for reason, (count, size, first) in account.skipped.items()}
        if account.skipped:
            where, reason = min((first[0], reason) for reason, (_, _, first) in account.skipped.items())
            record["first_skipped"] = f"{place(*where)}: {reason}"
        return record

    def add(self, record: dict) -> None:
        """Count a chunk. Raises `UserError` at the first skipped document where that is wanted."""
        if self._stop and record["skipped"]:
            raise UserError(f"{record['first_skipped']}: this document cannot be used; mend it, or leave out "
                            "--on-error stop to count such documents and go on")
        self.chunks += 1
        self.consumed += record["consumed"]
        self.unproven += record["unproven"]
        self._line = record["line"]
        for split, sums in self._splits.items():
            for key in sums:
                sums[key] += record["splits"][split][key]
            self.bytes_in += record["splits"][split]["bytes_in"]
        for reason, (count, size, examples) in record["skipped"].items():
            self._skipped[reason] = self._skipped.get(reason, Skipped(0, ())) + Skipped(count, tuple(examples))
            self._splits[TRAIN]["bytes_in"] += size
            self.bytes_in += size

    def skipped(self) -> dict[str, Skipped]:
        """By reason, sorted."""
        return dict(sorted(self._skipped.items()))

    def facts(self, split: str) -> dict:
        """What a manifest says of the documents of `split`; skipped ones are counted with the train split."""
        train = split == TRAIN
        return {**self._splits[split], "skipped": self.skipped() if train else {},
                "unproven_cuts": self.unproven if train else 0}
