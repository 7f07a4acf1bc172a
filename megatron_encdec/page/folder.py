"""The folder of a report: the next report replaces its files, and nothing else."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_atomic, write_json_atomic

RECORD = "report.json"  # the names of a report's files


def write_report(folder: Path, files: Mapping[Path, bytes], option: str) -> None:
    """Write `files`, by their paths in `folder`, each complete or absent and in this order.

    Files of an earlier report that this one has no use for are removed. Raises `UserError`, which names the command's
    `option`, where the folder cannot be written, or holds a file of one of these names that no report wrote.
    """
    earlier = _files_of_earlier(folder)
    if foreign := [name for name in files if name not in earlier and os.path.lexists(folder / name)]:
        raise UserError(f"{option} {folder}: {foreign[0]} is there, and no report wrote it ({RECORD} does not list "
                        "it); name another folder, or move it away")
    try:
        for inner in {path.parent for path in files}:
            (folder / inner).mkdir(parents=True, exist_ok=True)
            for old in (folder / inner).iterdir() if inner != Path() else ():
                if old.relative_to(folder) in earlier - files.keys():
                    old.unlink()
        write_json_atomic(folder / RECORD, {"files": sorted(map(str, files))})
        for name, data in files.items():
            write_atomic(folder / name, data)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written ({error.strerror}); name another folder") from None


def _files_of_earlier(folder: Path) -> set[Path]:
    """What an earlier report wrote there; nothing where there was none, or its record is not readable."""
    try:
        return {Path(name) for name in json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
