"""The manifest of data that came without one: made once, kept as PREFIX.fingerprint.json.

    1. `manifest_of_foreign(prefix)`   the kept one while the files' sizes and times stand, else computed and kept

It says what the files themselves tell (sizes, counts, hashes); who wrote them is not known: `tokenizer` and `settings`
are None. Its `inputs` are the two files as they were when hashed.
"""

from pathlib import Path

from megatron_encdec.data.shards import hash_ranges, ranges_of
from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.lock import taking_turns
from megatron_encdec.text import manifest as manifests
from megatron_encdec.text.indexed import SHARD_SIZE, IndexedFiles, bin_path, idx_path, read_header
from megatron_encdec.text.manifest import InputFile, Manifest


def record_path(prefix: str | Path) -> Path:
    """`PREFIX.fingerprint.json`."""
    return Path(f"{prefix}.fingerprint.json")


def read_record(prefix: str | Path) -> Manifest | None:
    """The kept manifest, whatever the data is now; None where it is absent or damaged: it is only a cache."""
    try:
        return manifests.read_file(record_path(prefix))
    except UserError:
        return None


def compute_record(prefix: str | Path) -> Manifest:
    """Hash the pair. Raises IntegrityError where it cannot be read or changes while it is read."""
    header, states = read_header(prefix), _states(prefix)
    ranges = ranges_of(prefix, [states[0].size], SHARD_SIZE)
    hashes = hash_ranges(ranges, f"hashing {prefix}")
    for one, found in zip(ranges, hashes, strict=True):
        if isinstance(found, OSError):
            raise IntegrityError(f"{one.path}: cannot read bytes {one.start:,}..{one.end:,}: {found.strerror}")
    *shards, index = hashes
    files = IndexedFiles(header.documents, header.bin_bytes // header.dtype.itemsize, header.dtype.name, states[0].size,
                         states[1].size, tuple(shards), index)
    record = describe_foreign(prefix, files)
    if record.inputs != states:
        raise IntegrityError(f"{prefix}: its files changed while they were read; try again when they are complete")
    return record


def describe_foreign(prefix: str | Path, files: IndexedFiles) -> Manifest:
    """The manifest of `files`, a pair that another tool wrote."""
    return manifests.describe(files, bytes_in=0, characters=0, skipped={}, tokenizer=None, settings=None,
                              inputs=_states(prefix))


def keep_record(prefix: str | Path, record: Manifest) -> bool:
    """Write it beside the data; False where the directory cannot be written (it is then computed each time)."""
    try:
        manifests.write(record_path(prefix), record)
    except OSError:
        return False
    return True


def manifest_of_foreign(prefix: str | Path) -> tuple[Manifest, str]:
    """The manifest of a pair without one, and what to say of it. The ranks of a node take turns: one hashes."""
    with taking_turns(idx_path(prefix)):
        record = read_record(prefix)
        if record and record.inputs == _states(prefix):
            where = f", as kept in {record_path(prefix)}"
        else:
            record = compute_record(prefix)
            where = f" computed, now kept in {record_path(prefix)}" if keep_record(prefix, record) else \
                " computed, not kept: its directory cannot be written"
    return record, (f"{prefix}: no manifest (another tool's file), so which tokenizer wrote it is not known; "
                    f"fingerprint {record.fingerprint[:12]}{where}")


def _states(prefix: str | Path) -> tuple[InputFile, InputFile]:
    """The pair as it is now, by suffix: it may be moved or renamed with its record."""
    bin_state, idx_state = (path.stat() for path in (bin_path(prefix), idx_path(prefix)))
    return (InputFile(".bin", bin_state.st_size, bin_state.st_mtime_ns),
            InputFile(".idx", idx_state.st_size, idx_state.st_mtime_ns))
