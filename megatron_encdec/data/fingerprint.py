"""What a manifest would say of data that has none: hashed once, kept in PREFIX.fingerprint.json.

    1. `without_manifest(prefix)`   the kept record while sizes and times stand, else computed and kept

The record holds the shards' hashes as a manifest does, so that `data/verify.py` can later tell which bytes have
changed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.data.shards import hash_ranges, ranges_of, shard_ranges
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.rundir.lock import taking_turns
from megatron_encdec.text.indexed import SHARD_SIZE, bin_path, idx_path
from megatron_encdec.text.manifest import data_fingerprint


@dataclass(frozen=True)
class FileState:
    """A file's size in bytes and time of change, as when it was hashed."""

    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Record:
    """PREFIX.fingerprint.json: hex sha256 of each shard of `.bin` (`shard_bytes` each) and of the `.idx`."""

    fingerprint: str
    shard_bytes: int
    shards: tuple[str, ...]
    idx_sha256: str
    files: dict[str, FileState]  # by suffix: bin, idx


def record_path(prefix: str | Path) -> Path:
    """`PREFIX.fingerprint.json`."""
    return Path(f"{prefix}.fingerprint.json")


def read_record(prefix: str | Path) -> Record | None:
    """The record beside the data, whatever the data is now; None where it is absent or damaged."""
    try:
        record = schema.build(Record, json.loads(record_path(prefix).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, UserError):
        return None  # only a cache, computed again
    whole = record.fingerprint == data_fingerprint(record.shards, record.idx_sha256)
    return record if whole and record.files.keys() == {"bin", "idx"} else None


def compute_record(prefix: str | Path) -> Record:
    """Hash the pair. Raises IntegrityError where it cannot be read or changes while it is read."""
    files = _file_states(prefix)
    ranges = ranges_of(prefix, shard_ranges([files["bin"].bytes], SHARD_SIZE))
    hashes = hash_ranges(ranges, f"hashing {prefix}")
    for one, found in zip(ranges, hashes, strict=True):
        if isinstance(found, OSError):
            raise IntegrityError(f"{one.path}: cannot read bytes {one.start:,}..{one.end:,}: {found.strerror}")
    if _file_states(prefix) != files:
        raise IntegrityError(f"{prefix}: its files changed while they were read; try again when they are complete")
    *shards, index = hashes
    return Record(data_fingerprint(tuple(shards), index), SHARD_SIZE, tuple(shards), index, files)


def keep_record(prefix: str | Path, record: Record) -> bool:
    """Write it beside the data; False where the directory cannot be written (it is then computed each time)."""
    try:
        write_json_atomic(record_path(prefix), schema.to_dict(record))
    except OSError:
        return False
    return True


def without_manifest(prefix: str | Path) -> tuple[str, str]:
    """(fingerprint, what to say of it) of a pair without a manifest. The ranks of a node take turns: one hashes."""
    says = f"{prefix}: no manifest (another tool's file), so which tokenizer wrote it is not known; fingerprint"
    with taking_turns(idx_path(prefix)):
        record = read_record(prefix)
        if record is not None and record.files == _file_states(prefix):
            return record.fingerprint, f"{says} {record.fingerprint[:12]}, as kept in {record_path(prefix)}"
        record = compute_record(prefix)
        kept = keep_record(prefix, record)
    where = f"now kept in {record_path(prefix)}" if kept else "not kept: its directory cannot be written"
    return record.fingerprint, f"{says} {record.fingerprint[:12]} computed, {where}"


def _file_states(prefix: str | Path) -> dict[str, FileState]:
    states = {}
    for path in (bin_path(prefix), idx_path(prefix)):
        status = path.stat()
        states[path.suffix[1:]] = FileState(status.st_size, status.st_mtime_ns)
    return states
