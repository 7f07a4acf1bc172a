"""What the user named -> the paths it stands for, and an account of what lies there and is not read.

    1. `expand(item, unread)`   a path as it is; a folder, searched to any depth; a pattern, what it matches
    2. `account_of(unread)`     what a folder or pattern holds besides, counted by suffix, in one line

Links are followed, to files and to folders; each folder is entered once, so that links in a circle do no harm. Names
that begin with a dot are passed over, and counted. What is there and cannot be looked into is refused.
"""

import glob
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from megatron_encdec.platform.errors import UserError

SHOWN = 8  # suffixes in the line
HIDDEN = "hidden (a name that begins with a dot)"
ANY_DEPTH = re.compile(r"(?:^|/)\*\*(?:/|$)")
SUFFIX = re.compile(r"(?:\.[a-z][a-z0-9]{0,8})?\.(?:gz|zst|bz2|xz)$|\.[^./\s]{1,12}$")
PARQUET = "python -c \"import pandas as p; p.read_csv('{0}'{1}).to_parquet('{0}.parquet')\""
WAYS = {".csv": PARQUET.replace("{1}", ""), ".tsv": PARQUET.replace("{1}", ", sep='\\t'"),
        ".arrow": "python -c \"import datasets as d; d.Dataset.from_file('{0}').to_parquet('{0}.parquet')\"",
        ".zip": "unpack it first: unzip '{0}'", ".tar": "unpack it first: tar -xf '{0}'",
        ".tgz": "unpack it first: tar -xf '{0}'", ".gz": "decompress it first: gzip -dk '{0}'",
        ".zst": "decompress it first: zstd -d '{0}'", ".xz": "decompress it first: xz -dk '{0}'",
        ".bz2": "decompress it first: bzip2 -dk '{0}'"}


def kind_of_unread(path: str, what: str = "") -> str:
    """As what the file at `path` is counted: its suffix, and `what` it is besides."""
    return HIDDEN if os.path.basename(path).startswith(".") else f"{suffix_of(path) or 'without a suffix'}{what}"


def account_of(unread: dict[str, str]) -> tuple[str, str]:
    """`3 .csv, 1 .json.bz2`, the most frequent first; and `; what to do` with the first file of the first kind."""
    counts = Counter(unread.values())
    kinds = sorted(counts, key=lambda kind: (kind == HIDDEN, -counts[kind]))
    rest = sum(counts[kind] for kind in kinds[SHOWN:])
    line = ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds[:SHOWN]) + (f", {rest:,} others" if rest else "")
    first = next((path for path, kind in unread.items() if kind == kinds[0] != HIDDEN), None)
    return line, way_out(first) if first else ""


def suffix_of(path: str) -> str:
    """The suffix in small letters, of a compressed file the one below it too; "" where there is none."""
    found = SUFFIX.search(os.path.basename(path).lower(), 1)
    return found.group() if found else ""


def way_out(path: str) -> str:
    """`; what to do` with a file that has a suffix we do not read, "" where we know nothing."""
    suffix = suffix_of(path)
    way = WAYS.get(".tar" if suffix.startswith(".tar.") else suffix) or WAYS.get(os.path.splitext(suffix)[1])
    if not way:
        return ""
    return "; " + ("convert it: " if way.startswith("python") else "") + way.replace("{0}", path)


def expand(item: str, unread: dict[str, str]) -> tuple[list[str], bool]:
    """The paths that `item` stands for, sorted, and whether it names one file; what is passed over goes to `unread`
    (path: kind). Raises `UserError` for a path that is not there, or a pattern that matches nothing."""
    if os.path.isdir(item):
        return sorted(path for _, paths in _walk([item], unread) for path in paths), False
    if os.path.lexists(item):
        return [item], True
    if not glob.has_magic(item):
        raise UserError(f"{item}: no such file or directory (input)")
    matches = set(_matches(_pattern(item), unread))
    if not matches:
        raise UserError(f"{item}: no file matches this pattern (input)")
    folders = sorted(path for path in matches if os.path.isdir(path))
    inside = {path for _, paths in _walk(folders, unread) for path in paths}
    return sorted(inside | matches - set(folders)), False


def _pattern(item: str) -> str:
    """`item` as a glob, in which the folders that are there under just these names are no pattern."""
    there = item
    while there and not os.path.isdir(there):
        there = os.path.dirname(there)
    return glob.escape(there) + item[len(there):]


def _matches(pattern: str, unread: dict[str, str]) -> Iterator[str]:
    """What `glob` finds, with a `**` that enters each folder once."""
    parts = ANY_DEPTH.split(pattern, maxsplit=1)
    if len(parts) == 1:
        yield from glob.iglob(pattern)
        return
    before, after = parts[0] or (os.sep if pattern.startswith(os.sep) else ""), parts[1] or "*"
    for folder, _ in _walk(filter(os.path.isdir, glob.iglob(before or os.curdir)), unread):
        name = folder if before else folder.removeprefix(os.curdir).removeprefix(os.sep)
        yield from _matches(os.path.join(glob.escape(name), after), unread)


def _walk(roots: Iterable[str], unread: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, paths of its files) of `roots` and all folders below, each once, by device and inode. What can be
    reached without a link has its name without one."""
    waiting, through_links, entered = [], deque(), set()
    for root in roots:
        (through_links if os.path.islink(root) else waiting).append(root)
    while waiting or through_links:
        folder = waiting.pop() if waiting else through_links.popleft()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            folders = {entry for entry in entries if entry.is_dir()}
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot look into this folder: {error.strerror}; make it "
                            "readable, or name the files to read with a pattern") from None
        for entry in entries:
            if entry.name.startswith("."):
                unread[entry.path] = kind_of_unread(entry.path)
            elif entry in folders:
                (through_links if entry.is_symlink() else waiting).append(entry.path)
        yield folder, [entry.path for entry in entries if entry not in folders and not entry.name.startswith(".")]
