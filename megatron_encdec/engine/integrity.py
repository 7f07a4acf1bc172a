"""What checkpoints are called, and whether they are whole.

Every byte of a checkpoint is covered by a checksum, and wrong ones are named before anything is loaded.
`checksums.json` holds size and sha256 of every other file, and the sha256 of that list. It is written in one exact
form, and a file in any other form is refused, so that it covers itself.

    1. `name_of(step)`, `saved_names(...)`   step_00001000 for step 1000, `latest` for the newest; RUN_DIR[@STEP]
    2. `checksums_text(files)`    the bytes of checksums.json
    3. `verify(checkpoint)`       problems of one checkpoint, by one process; `[]` is intact
    4. `check(checkpoint)`        the same by all ranks, each hashing a share; `IntegrityError` on every rank
    5. `newest_intact(...)`       what to go on from instead
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from megatron_encdec.platform.children import available_cores
from megatron_encdec.platform.errors import Gone, IntegrityError, UserError
from megatron_encdec.rundir.files import sha256_file

LATEST, CHECKSUMS = "latest", "checksums.json"
_NAME = re.compile(r"step_\d{8,}")
Key = TypeVar("Key")


def name_of(step: int) -> str:
    """Directory name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step of a checkpoint's directory name."""
    return int(name.removeprefix("step_"))


def split_step(run: str) -> tuple[str, int | None]:
    """`RUN_DIR[@STEP]` as path and step (None: the newest). A directory that is there under the whole name is meant.
    Raises `UserError` where there is none and what follows the last @ is no step number."""
    path, at, step = run.rpartition("@")
    if not at or os.path.isdir(run):
        return run, None
    if not (path and step.isascii() and step.isdigit()):
        raise UserError(f"{run}: there is no such directory, and read as RUN_DIR@STEP it has no step number after the "
                        f"last @ ({step!r})" if path else f"{run}: there is no such directory, and none is named "
                        "before the @")
    return path, int(step)


def listed(names: list[str], most: int = 5) -> str:
    """`names` for people: the newest ones, and how many more there are."""
    earlier = f"{len(names) - most} earlier ones and " if len(names) > most else ""
    return earlier + ", ".join(names[-most:]) if names else "none"


def saved_names(checkpoints: Path) -> list[str]:
    """Names of the finished checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((entry.name for entry in checkpoints.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir()),
                  key=step_of)


def checksums_text(files: dict[str, tuple[int, str]]) -> str:
    """The content of checksums.json for `files`: name -> (bytes, sha256)."""
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    own = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": own}, indent=2) + "\n"


def verify(checkpoint: Path, contents: bool = True) -> list[str]:
    """One line for each thing wrong with `checkpoint`, naming the file; `[]` if it is intact. contents: read every
    byte; else only what is there and how long it is, in a moment."""
    files, problems = _recorded(checkpoint)
    return problems or _compare(checkpoint, files, sorted(files), contents)


def check(checkpoint: Path) -> None:
    """`verify` by all ranks, each hashing a share of the files; collective. Raises `damaged`'s error on every rank."""
    import torch.distributed as dist  # here: names of checkpoints are wanted before a command loads torch

    files, problems = _recorded(checkpoint)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not problems:
        sizes = {name: size for name, (size, _) in files.items()}
        problems = _compare(checkpoint, files, fair_shares(sizes, ranks)[rank])
    if ranks > 1:
        everyones: list = [None] * ranks
        dist.all_gather_object(everyones, problems)
        problems = list(dict.fromkeys(problem for one in everyones for problem in one))
    if problems:
        raise damaged(checkpoint, problems)


def damaged(checkpoint: Path, problems: list[str]) -> IntegrityError:
    """The error to raise for `checkpoint`: what is wrong with it, and the newest intact one before it."""
    if _NAME.fullmatch(checkpoint.name) and not checkpoint.exists():
        return gone(checkpoint)
    shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
    intact = newest_intact(checkpoint.parent, before=checkpoint.name)
    offer = (f"the newest intact checkpoint is {intact.name}: use it with --fallback" if intact
             else "there is no intact one beside it")
    return IntegrityError(f"{shown}; {offer}")


def gone(checkpoint: Path) -> Gone:
    """The error to raise where `checkpoint` was there a moment ago: its run goes on, and has deleted it."""
    return Gone(f"{checkpoint}: was deleted while it was read (a run keeps its newest checkpoint.keep and "
                "those at the ends of phases); give the command again")


def newest_intact(checkpoints: Path, before: str = "") -> Path | None:
    """The newest checkpoint in `checkpoints` that `verify` finds nothing wrong with; if `before` is the name of one, of
    earlier steps only: later ones were left by a run that has gone on from an older one since."""
    limit = step_of(before) if _NAME.fullmatch(before) else None
    earlier = [name for name in saved_names(checkpoints) if limit is None or step_of(name) < limit]
    return next((checkpoints / name for name in reversed(earlier) if not verify(checkpoints / name)), None)


def _recorded(checkpoint: Path) -> tuple[dict, list[str]]:
    """The files by checksums.json, and what is wrong with it or with the set of files."""
    path = checkpoint / CHECKSUMS
    try:
        text = path.read_text(encoding="utf-8")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(text)["files"].items()}
        there = {entry.name for entry in checkpoint.iterdir()}
    except FileNotFoundError:
        return {}, [f"{path}: missing; this checkpoint is not whole"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{path}: unreadable ({error})"]
    if text != checksums_text(files):
        return {}, [f"{path}: altered: it is not what its own checksum says"]
    missing = [f"{checkpoint / name}: missing" for name in sorted(files.keys() - there)]
    extra = [f"{checkpoint / name}: not a file of this checkpoint; remove it"
             for name in sorted(there - files.keys() - {CHECKSUMS})]
    return files, missing + extra


def fair_shares(sizes: Mapping[Key, int], ranks: int) -> list[list[Key]]:
    """The keys of `sizes` in `ranks` sorted lists of about equal size: the largest first, each to the smallest list."""
    shares, filled = [[] for _ in range(ranks)], [0] * ranks
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        least = filled.index(min(filled))
        shares[least].append(key)
        filled[least] += sizes[key]
    return [sorted(share) for share in shares]


def _compare(checkpoint: Path, files: dict, names: list[str], contents: bool = True) -> list[str]:
    """Problems of the files `names`, of their sizes alone without `contents`. Hashing leaves Python's lock alone, so
    threads help."""
    def problem(name: str) -> str | None:
        path, (size, digest) = checkpoint / name, files[name]
        try:
            found = path.stat().st_size
            if found != size:
                return f"{path}: {found} bytes, {size} were written: it is truncated or was altered"
            if contents and sha256_file(path) != digest:
                return f"{path}: altered: its sha256 is not the one in {CHECKSUMS}"
        except OSError as error:
            return f"{path}: unreadable ({error.strerror})"
        return None

    with ThreadPoolExecutor(min(8, available_cores())) as pool:
        return [found for found in pool.map(problem, names) if found]
