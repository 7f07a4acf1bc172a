"""What a file's first bytes say and its name does not, told before any work is done.

    1. `check_head(...)`   refuses what is wrong with a whole file: pointers of Git LFS, other formats under this name,
                           lines in UTF-16, line ends of CR alone, one JSON array or object
    2. `is_utf16(data)`    of a whole text, which is counted and not refused
"""

import json
import re
import shlex

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import POINTER_BYTES, refuse_pointer
from megatron_encdec.text.streams import open_stream, reading

HEAD = 64 << 10  # bytes that are looked at
UTF16_BYTES = 1024  # of them, for UTF-16 without a mark
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # the last, and the first with two zeros: UTF-32
FORMATS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
           b"PAR1": "Parquet", b"PARE": "Parquet", b"ARROW1": "Arrow", b"%PDF-": "PDF", b"<!doctype html": "HTML",
           b"<html": "HTML"}
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a zstd file may begin with such a frame
ARRAY = re.compile(rb'\[\s*["{]')
OBJECT = re.compile(rb'\{\s*\n\s*"(?:[^"\\\n]|\\.)*"\s*:')
CR_ALONE = re.compile(rb"\}[ \t]*\r\s*\{")
ONE_BY_ONE = "import json,sys; [print(json.dumps(d)) for d in json.load(sys.stdin)]"
AS_ONE_LINE = "import json,sys; print(json.dumps(json.load(sys.stdin)))"


class OneObject(UserError):
    """The file is one JSON object over many lines: a description of data rather than data."""


def check_head(path: str, kind: str, size: int) -> None:
    """Raises `UserError` where the file at `path`, of `size` bytes, is not what its `kind` (`corpus.kind_of`) says."""
    if size < POINTER_BYTES:
        refuse_pointer(path)
    if kind == "text":
        return
    with reading(path), open(path, "rb") as file:
        head = file.read(HEAD if kind == "lines" else 16)
    wanted = {"lines": None, "rows": "Parquet"}.get(kind, "gzip" if path.lower().endswith(".gz") else "zstd")
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
                        + _converted(path, "iconv -f UTF-16 -t UTF-8") + " (or -f UTF-32)")
    if body and not body.strip(b"\0"):
        raise IntegrityError(f"{path}: begins with nothing but zero bytes: its content was never written (a crash, a "
                             "full disk); copy it again")
    if b"\n" not in body and CR_ALONE.search(body):
        raise UserError(f"{path}: its lines end with CR alone, not with LF; convert it: "
                        + _converted(path, "tr '\\r' '\\n'"))
    line, _, rest = body.partition(b"\n")
    if body[:1] == b"[" and ARRAY.match(body) and not (rest and _is_json(line)):
        raise UserError(f"{path}: a JSON array, not JSON lines (one object a line); convert it: "
                        + _converted(path, f'python -c "{ONE_BY_ONE}"'))
    if body[:1] == b"{" and not _is_json(line) and (OBJECT.match(body) or len(head) < HEAD and rest and _is_json(body)):
        raise OneObject(f"{path}: one JSON object over many lines, not JSON lines (one object a line); if it is a "
                        "document: " + _converted(path, f'python -c "{AS_ONE_LINE}"'))


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _converted(path: str, command: str) -> str:
    """The shell's command that sends the file through `command`, and compresses it again."""
    name = shlex.quote(path)
    for suffix, tool in ((".gz", "gzip"), (".zst", "zstd")):
        if path.lower().endswith(suffix):
            return f"{tool} -dc {name} | {command} | {tool} > NEW.jsonl{suffix}"
    return f"{command} < {name} > NEW.jsonl"


def is_utf16(data: bytes) -> bool:
    """Whether `data` begins with the mark of UTF-16 or UTF-32, or has a zero in each pair of bytes, as Latin has."""
    if data.startswith(UTF16_MARKS):
        return True
    if len(data) < 8 or b"\0" not in data[:2]:
        return False
    even, odd = data[:UTF16_BYTES:2], data[1:UTF16_BYTES:2]
    return (all(even) and not any(odd)) or (all(odd) and not any(even))
