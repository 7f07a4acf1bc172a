"""Compressed files as streams of their decompressed bytes; where one cannot be read, the true cause.

    1. `open_stream(path)`    a `.gz` or `.zst` file -> `Stream`
    2. `Stream.read(count)`   the next bytes; members and frames one after the other are one stream

pyarrow decodes zstd frames whose window is at most 128 MB. Where a frame needs more (`zstd --long=28` to `31`), the
`zstd` program goes on from the same byte, if it is installed. (Why not the package zstandard, which takes long windows
too: its reader ends a file that is cut off as if that were all of it.)
"""

import contextlib
import gzip
import shlex
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text.remote import bare, is_remote, open_input

PIECE = 1 << 20  # bytes read at once from a stream
PACKERS = {".gz": "gzip", ".zst": "zstd"}
TOO_LONG = "Frame requires too much memory"
CUT_OFF = ("Truncated compressed stream", "end-of-stream marker", "premature end", "unexpected end")
NO_DATA = ("Unknown frame descriptor", "Not a gzipped file", "unsupported format", "unknown header")


def packer_of(path: str) -> str | None:
    """The program that packs and unpacks such a file, `gzip` or `zstd`; None where the name says it is not packed."""
    name = bare(path).lower()
    return next((tool for suffix, tool in PACKERS.items() if name.endswith(suffix)), None)


def piped(path: str, command: str | None = None) -> str:
    """For messages: the shell's command that sends a file of lines through `command`, and packs it again."""
    name, tool = shlex.quote(path), packer_of(path)
    if not tool:
        return f"{command} < {name} > NEW.jsonl"
    return " | ".join(filter(None, (f"{tool} -dc {name}", command, tool))) + f" > NEW.jsonl.{path.rpartition('.')[2]}"


class Stream:
    """Decompressed bytes of a `.gz` or `.zst` file; `consumed` counts bytes taken on disk."""

    def __init__(self, raw: BinaryIO, path: str):
        self._raw, self._path, self._lines, self._given = raw, path, 0, 0
        if packer_of(path) == "gzip":
            self._source = gzip.GzipFile(fileobj=raw)
        else:
            import pyarrow  # comes with datasets

            self._source = pyarrow.CompressedInputStream(raw, "zstd")

    def read(self, count: int) -> bytes:
        """Up to `count` bytes, none at the end. Raises `UserError` with the cause where the file cannot be read
        to its end: what is lost after that place cannot be counted."""
        try:
            piece = self._source.read(count)
        except (EOFError, zlib.error, OSError) as error:
            if TOO_LONG in str(error) and not isinstance(self._source, _ZstdProgram):
                self._raw.close()
                if is_remote(self._path):
                    raise UserError(f"{self._path}: was compressed with a window of more than 128 MB (zstd --long), "
                                    "which only a file of this machine may have; download it, and name the file"
                                    ) from None
                self._raw = open(self._path, "rb", buffering=0)  # noqa: SIM115  (see `close`)
                self._source = _ZstdProgram(self._raw, self._path, self._given)
                return self.read(count)
            raise self._refusal(error) from None
        self._lines += piece.count(b"\n")
        self._given += len(piece)
        return piece

    @property
    def consumed(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        """Close the file; end the program that decodes, if there is one."""
        self._raw.close()
        if isinstance(self._source, _ZstdProgram):
            self._source.close()

    def _refusal(self, error: Exception) -> UserError:
        if getattr(error, "errno", None):
            return UserError(f"{self._path}: cannot read the input after line {self._lines}: {error.strerror}")
        said, where = " ".join(str(error).split())[:200], f"after line {self._lines}"
        if any(words in said for words in CUT_OFF):
            return IntegrityError(f"{self._path}: cut off {where}: the file ends too early ({said}); copy it again")
        if "ictionary" in said:
            return UserError(f"{self._path}: was compressed with a dictionary (zstd -D), without which it cannot be "
                             f"read ({said}); decompress it where the dictionary is")
        if self._given and any(words in said for words in NO_DATA):
            return IntegrityError(f"{self._path}: {where} something follows that {packer_of(self._path)} did not write "
                                  f"({said}); copy it again, or leave that out: {piped(self._path)}")
        return IntegrityError(f"{self._path}: damaged {where} ({said}); copy it again")


class _ZstdProgram:
    """What the `zstd` program makes of the whole file `raw`, from byte `skip` of it on."""

    def __init__(self, raw: BinaryIO, path: str, skip: int):
        program = shutil.which("zstd")
        if not program:
            raise UserError(f"{path}: was compressed with a window of more than 128 MB (zstd --long), which takes the "
                            "zstd program to read, and it is not installed; install it, or compress the file again: "
                            f"zstd -dc --long=31 {shlex.quote(path)} | zstd > NEW.jsonl.zst")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
        self._process = subprocess.Popen([program, "-dcq", "--long=31"], stdin=raw, stdout=subprocess.PIPE,
                                         stderr=self._errors)
        while skip and (piece := self.read(min(skip, PIECE))):
            skip -= len(piece)

    def read(self, count: int) -> bytes:
        """The next bytes; OSError with what the program says where it gave up."""
        piece = self._process.stdout.read(count)
        if not piece and (code := self._process.wait()):
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").strip().removeprefix("zstd: ")
            raise OSError(f"the zstd program was ended by signal {-code}" if code < 0 else said)
        return piece

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[Stream]:
    """The decompressed bytes of the compressed file at `path`. Raises `UserError` if it cannot be read."""
    with reading(path):
        raw = open_input(path, buffering=0)  # the stream closes it; unbuffered, so that `tell` is right
    with contextlib.closing(Stream(raw, path)) as stream:
        yield stream


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn an error of the system into a `UserError`: the input at `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot read the input: {error.strerror}") from None
