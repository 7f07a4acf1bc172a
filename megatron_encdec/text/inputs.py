"""What the user named -> the files to read; what is not what its name says is refused before any work is done.

    1. `list_files(inputs)`   the files in a fixed order, with an account of what lies there besides and is not read
    2. `_expand(item)`        a path as it is; a folder, searched to any depth; a pattern, what it matches
    3. `_take_remote(url)`    objects of a store (text/remote.py)
    4. `_check_head(file)`    refuses what the first bytes say is wrong with a whole file: pointers of Git LFS, another
                              format than the name's, lines in UTF-16 or with ends of CR alone, one JSON array or object

Links are followed, to files and to folders; each folder is entered once, so that links in a circle do no harm. Names
that begin with a dot are passed over, and counted. What is there and cannot be looked into is refused.
"""

import glob
import json
import os
import re
import stat
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import POINTER_BYTES, refuse_pointer
from megatron_encdec.text.corpus import BYTE_ORDER_MARK, HUB, SUFFIXES, is_utf16, kind_of
from megatron_encdec.text.manifest import InputFile
from megatron_encdec.text.remote import bare, is_remote, list_remote, open_input
from megatron_encdec.text.streams import open_stream, packer_of, piped, reading

SHOWN = 8  # suffixes in the line about what is not read
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
HEAD = 64 << 10  # bytes of a file that are looked at
FORMATS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
           b"PAR1": "Parquet", b"PARE": "Parquet", b"ARROW1": "Arrow", b"%PDF-": "PDF", b"<!doctype html": "HTML",
           b"<html": "HTML"}
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a zstd file may begin with such a frame
ARRAY = re.compile(rb'\[\s*["{]')
OBJECT = re.compile(rb'\{\s*\n\s*"(?:[^"\\\n]|\\.)*"\s*:')
CR_ALONE = re.compile(rb"\}[ \t]*\r\s*\{")
ONE_BY_ONE = "import json,sys; [print(json.dumps(d)) for d in json.load(sys.stdin)]"
AS_ONE_LINE = "import json,sys; print(json.dumps(json.load(sys.stdin)))"


class _OneObject(UserError):
    """The file is one JSON object over many lines: a description of data rather than data."""


def list_files(inputs: Iterable[str | Path]) -> list[InputFile]:
    """The files named by `inputs`, each once: inputs in the order given, files inside each by path. What lies in a
    folder and is not read, and other names of a file already listed, are said on standard error. Raises `UserError` for
    a path that is not there, matches nothing, has another suffix, cannot be read, or is not what its name says."""
    found: dict[tuple, InputFile] = {}
    unread, aliases = {}, {}
    for item in map(str, inputs):
        if is_remote(item):
            besides = {}
            _take_remote(item, found, besides)
            unread |= besides
            continue
        if item.startswith(HUB) and not os.path.exists(item):
            found.setdefault((item,), InputFile(item, 0, 0))
            continue
        item = os.path.join(".", item) if item.startswith(HUB) else item  # a file of that name, not of the hub
        besides: dict[str, str] = {}
        paths, named = _expand(item, besides)
        kept = [path for path in paths if _is_kept(path, named, found, aliases, besides)]
        if not kept:
            line, way = _account_of(besides)
            there = f"; there are {line}; supported: {', '.join(SUFFIXES)}{way}" if besides else ""
            raise UserError(f"{item}: no file to read (input){there}")
        unread |= besides
    if not found:
        raise UserError("no input given: name files, directories or globs of " + ", ".join(SUFFIXES))
    if unread:
        print("note: not read: " + "".join(_account_of(unread)), file=sys.stderr)
    if aliases:
        first = next(iter(aliases))
        print(f"note: read once: {len(aliases):,} files that are links to others of the input (first: {first} is "
              f"{aliases[first]})", file=sys.stderr)
    return list(found.values())


def _take_remote(item: str, found: dict[tuple, InputFile], unread: dict[str, str]) -> None:
    """Add to `found` the objects that a URL stands for."""
    objects, named = list_remote(item, unread)
    kept = 0
    for url, size, version in objects:
        if not bare(url).lower().endswith(SUFFIXES):
            if named:
                raise UserError(f"{url}: cannot read this kind of file; supported: {', '.join(SUFFIXES)}")
            unread[url] = _kind_of_unread(url)
            continue
        kept += 1
        if (url,) in found:
            continue
        file = InputFile(url, size, 0, version)
        _check_head(file)
        found[(url,)] = file
    if not kept:
        there = f"; there are {_account_of(unread)[0]}; supported: {', '.join(SUFFIXES)}" if unread else ""
        raise UserError(f"{item}: no file to read (input){there}")


def _is_kept(path: str, named: bool, found: dict[tuple, InputFile], aliases: dict[str, str],
             unread: dict[str, str]) -> bool:
    """Whether `path` is a file to read; it is in `found` then. What a folder or pattern has besides goes to `unread`,
    what the user `named` is refused."""
    supported = path.lower().endswith(SUFFIXES)
    if not supported and not named and os.path.exists(path):
        unread[path] = _kind_of_unread(path)
        return False
    status = _status(path)
    if not supported:
        raise UserError(f"{path}: cannot read this kind of file; supported: {', '.join(SUFFIXES)}{_way_out(path)}")
    key = (status.st_dev, status.st_ino) if status.st_nlink > 1 else (os.path.realpath(path),)
    if key in found:
        if os.path.abspath(path) != os.path.abspath(found[key].path):
            aliases[path] = found[key].path
        return True
    file = InputFile(path, status.st_size, status.st_mtime_ns)
    try:
        _check_head(file)
    except _OneObject:
        if named or ".jsonl" in path.lower() or ".ndjson" in path.lower():
            raise
        unread[path] = _kind_of_unread(path, " (one JSON object over many lines)")
        return False
    found[key] = file
    return True


def _status(path: str) -> os.stat_result:
    """Raises `UserError` where `path` is nothing that can be read from the start, as often as needed."""
    try:
        path.encode("utf-8")
        status = os.stat(path)
    except UnicodeEncodeError:
        raise UserError(f"{path!r}: the file's name is not UTF-8; rename it") from None
    except OSError as error:
        if os.path.islink(path):
            raise UserError(f"{path}: a link to {os.readlink(path)}, which cannot be read ({error.strerror}); mend the "
                            "link or remove it") from None
        raise UserError(f"{path}: cannot read the input: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: a pipe, socket or device, not a file; write its content to a file and name that")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot read the input: Permission denied; make it readable, or leave it out")
    return status


def _expand(item: str, unread: dict[str, str]) -> tuple[list[str], bool]:
    """The paths that `item` stands for, sorted, and whether it names one file; what is passed over goes to `unread`
    (path: kind)."""
    if os.path.isdir(item):
        return sorted(path for _, paths in _walk([item], unread) for path in paths), False
    if os.path.lexists(item):
        return [item], True
    if not glob.has_magic(item):
        raise UserError(f"{item}: no such file or directory (input)")
    there = item  # of it, the folders that are there under just these names are no pattern
    while there and not os.path.isdir(there):
        there = os.path.dirname(there)
    matches = set(_matches(glob.escape(there) + item[len(there):], unread))
    if not matches:
        raise UserError(f"{item}: no file matches this pattern (input)")
    folders = set(filter(os.path.isdir, matches))
    inside = {path for _, paths in _walk(sorted(folders), unread) for path in paths}
    return sorted(inside | matches - folders), False


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
    waiting, entered = deque(), set()  # links wait at the end, all else is taken first
    for root in roots:
        (waiting.append if os.path.islink(root) else waiting.appendleft)(root)
    while waiting:
        folder = waiting.popleft()
        try:
            status = os.stat(folder)
            if (place := (status.st_dev, status.st_ino)) in entered:
                continue
            entered.add(place)
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            folders = {entry for entry in entries if entry.is_dir()}
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot look into this folder: {error.strerror}; make it "
                            "readable, or name the files to read with a pattern") from None
        files = []
        for entry in entries:
            if entry.name.startswith("."):
                unread[entry.path] = HIDDEN
            elif entry in folders:
                (waiting.append if entry.is_symlink() else waiting.appendleft)(entry.path)
            else:
                files.append(entry.path)
        yield folder, files


def _account_of(unread: dict[str, str]) -> tuple[str, str]:
    """`3 .csv, 1 .json.bz2`, the most frequent first; and `; what to do` with the first file of the first kind."""
    counts = Counter(unread.values())
    kinds = sorted(counts, key=lambda kind: (kind == HIDDEN, -counts[kind]))
    rest = sum(counts[kind] for kind in kinds[SHOWN:])
    line = ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds[:SHOWN]) + (f", {rest:,} others" if rest else "")
    first = next((path for path, kind in unread.items() if kind == kinds[0] != HIDDEN), None)
    return line, _way_out(first) if first else ""


def _kind_of_unread(path: str, what: str = "") -> str:
    """As what the file at `path` is counted: its suffix, and `what` it is besides."""
    return HIDDEN if os.path.basename(path).startswith(".") else f"{suffix_of(path) or 'without a suffix'}{what}"


def suffix_of(path: str) -> str:
    """The suffix in small letters, of a compressed file the one below it too; "" where there is none."""
    found = SUFFIX.search(os.path.basename(path).lower(), 1)
    return found.group() if found else ""


def _way_out(path: str) -> str:
    """`; what to do` with a file that has a suffix we do not read, "" where we know nothing."""
    if is_remote(path):
        return ""
    suffix = suffix_of(path)
    way = WAYS.get(".tar" if suffix.startswith(".tar.") else suffix) or WAYS.get(os.path.splitext(suffix)[1])
    if not way:
        return ""
    return "; " + ("convert it: " if way.startswith("python") else "") + way.replace("{0}", path)


def _check_head(file: InputFile) -> None:
    """Raises `UserError` where the file is not what its name says."""
    path, kind = file.path, kind_of(file.path)
    if file.size < POINTER_BYTES and not is_remote(path):
        refuse_pointer(path)
    if kind == "text":
        return
    with reading(path), open_input(path) as opened:
        head = opened.read(HEAD if kind == "lines" else 16)
    wanted = {"lines": None, "rows": "Parquet", "stream": packer_of(path)}[kind]
    if wanted and not head:
        raise IntegrityError(f"{path}: 0 bytes, which is no {wanted} file, not even an empty one; copy it again, or "
                             "remove it")
    _check_format(path, head, wanted)
    if kind == "stream":
        with open_stream(path) as stream:
            head = stream.read(HEAD)
        _check_format(path, head, None, " when decompressed")
    if kind != "rows":
        _check_lines(path, head)


def _check_format(path: str, head: bytes, wanted: str | None, when: str = "") -> None:
    start = head[:64].lstrip().lower() if head[:1] in (b"<", b"\n", b" ", b"\r") else head
    of_mark = next((name for mark, name in FORMATS.items() if start.startswith(mark)), None)
    found = "zstd" if SKIPPABLE.match(head) else of_mark
    if found == wanted:
        return
    if found == "HTML":
        raise UserError(f"{path}: is an HTML page{when}, such as a server sends instead of a file it will not give; "
                        "download it again")
    if found:
        raise UserError(f"{path}: holds {found} data{when}, which its name does not say; give it a name that ends as "
                        "such files do (a link is enough), or unpack it")
    raise IntegrityError(f"{path}: is no {wanted} file (it begins with {head[:8]!r}); name it by what it holds (a link "
                         "is enough), or copy it again")


def _check_lines(path: str, head: bytes) -> None:
    """Refuse what is not lines, of JSON, in UTF-8, at all. `head`: up to HEAD bytes, decompressed."""
    body = head.removeprefix(BYTE_ORDER_MARK).strip()
    if is_utf16(head):
        raise UserError(f"{path}: is in UTF-16 or UTF-32, not in UTF-8; convert it: "
                        f"{piped(path, 'iconv -f UTF-16 -t UTF-8')} (or -f UTF-32)")
    if body and not body.strip(b"\0"):
        raise IntegrityError(f"{path}: begins with nothing but zero bytes: its content was never written (a crash, a "
                             "full disk); copy it again")
    if b"\n" not in body and CR_ALONE.search(body):
        command = piped(path, "tr '\\r' '\\n'")
        raise UserError(f"{path}: its lines end with CR alone, not with LF; convert it: {command}")
    line, _, rest = body.partition(b"\n")
    if body[:1] == b"[" and ARRAY.match(body) and not (rest and _is_json(line)):
        command = piped(path, f'python -c "{ONE_BY_ONE}"')
        raise UserError(f"{path}: a JSON array, not JSON lines (one object a line); convert it: {command}")
    if body[:1] == b"{" and not _is_json(line) and (OBJECT.match(body) or len(head) < HEAD and rest and _is_json(body)):
        command = piped(path, f'python -c "{AS_ONE_LINE}"')
        raise _OneObject(f"{path}: one JSON object over many lines, not JSON lines (one object a line); if it is a "
                         f"document: {command}")


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True
