"""Files that are complete or absent: write beside, fsync, rename, fsync the directory.

A file that is only a pointer to its content (`refuse_pointer`) counts as absent.
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_encdec.platform.errors import UserError

POINTER_BYTES = 1024  # no pointer is larger
POINTERS = {b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
            b"version https://hawser.github.com/spec/": ("Git LFS", "git lfs pull"),
            b"/annex/objects/": ("git-annex", "git annex get .")}


def is_git_lfs_pointer(path: str | Path) -> bool:
    """Whether the file at `path` is the small text that stands for a file which Git LFS (or git-annex) has not
    fetched. False where there is no such file, or it cannot be read."""
    return _pointer_of(path) is not None


def refuse_pointer(path: str | Path) -> None:
    """Raises `UserError` where the file at `path` is a pointer that Git LFS or git-annex left in the place of one."""
    if of := _pointer_of(path):
        raise UserError(f"{path}: a {of[0]} pointer, not the file itself, which was never downloaded; run `{of[1]}` in "
                        f"{Path(path).absolute().parent} (or download the file again)")


def _pointer_of(path: str | Path) -> tuple[str, str] | None:
    try:
        if os.stat(path).st_size >= POINTER_BYTES or not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            head = file.read(POINTER_BYTES)
    except OSError:
        return None
    return next((of for start, of in POINTERS.items() if head.startswith(start)), None)


def fsync_directory(path: str | Path) -> None:
    """Make renames and unlinks inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(temporary: str | Path, final: str | Path) -> None:
    """Rename a finished `temporary` (already fsynced) to `final`, atomically and durably."""
    os.replace(temporary, final)
    fsync_directory(Path(final).parent)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old content or all of the new."""
    path = Path(path)
    if isinstance(data, str):
        data = data.encode("utf-8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
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
    """Hex sha256 of a file's bytes, read in pieces of 1 MiB."""
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
