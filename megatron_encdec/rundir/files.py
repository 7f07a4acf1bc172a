"""Files that are complete or absent: write beside, fsync, rename, fsync the directory.

A file that is only a pointer to its content (`refuse_pointer`) counts as absent.
"""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO

from megatron_encdec.platform.errors import UserError

POINTER_BYTES = 1024  # no pointer is larger
POINTERS = {b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
            b"version https://hawser.github.com/spec/": ("Git LFS", "git lfs pull"),
            b"/annex/objects/": ("git-annex", "git annex get .")}


def refuse_pointer(path: str | Path) -> None:
    """`UserError` where the file at `path` is the small text that stands for one which Git LFS (or git-annex) has not
    fetched. A file that is not there, or cannot be read, is for the caller to refuse."""
    try:
        if os.stat(path).st_size >= POINTER_BYTES or not os.path.isfile(path):
            return
        with open(path, "rb") as file:
            head = file.read(POINTER_BYTES)
    except OSError:
        return
    for start, (what, command) in POINTERS.items():
        if head.startswith(start):
            raise UserError(f"{path}: a {what} pointer, not the file itself, which was never downloaded; run "
                            f"`{command}` in {Path(path).absolute().parent} (or download the file again)")


def flush_to_disk(file: BinaryIO) -> None:
    """Make what was written to an open file durable."""
    file.flush()
    os.fsync(file.fileno())


def fsync_directory(path: str | Path) -> None:
    """Make renames and unlinks inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Make the files and directories in and below `directory` durable."""
    for path in (*directory.rglob("*"), directory):
        fsync_directory(path)  # a descriptor of a file does as well


def replace_durably(temporary: str | Path, final: str | Path) -> None:
    """Rename a finished `temporary` (already fsynced) to `final`, atomically and durably."""
    os.replace(temporary, final)
    fsync_directory(Path(final).parent)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old content or all of the new."""
    path = Path(path)
    if isinstance(data, str):
        data = data.encode("utf-8")
    # hosts and containers that share the folder may have the same pid
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            flush_to_disk(file)
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """Readable JSON; floats keep every digit."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """`write_atomic` of `json_bytes`."""
    write_atomic(path, json_bytes(value))


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
