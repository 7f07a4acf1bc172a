"""One process at a time in a folder: the second one is refused and told who holds it.

`run.lock` is held with flock, which the system lets go of when its process ends, however it ends. Its content says
who that is, for people. Where the file system knows no flock (some NFS mounts), the content decides alone: a holder
on this host that is no longer running (another boot, no such pid, or a pid used anew) holds nothing.

    1. `with FolderLock(folder, option) as lock:`     `lock.note` says whether a stale one was found
    2. `with taking_turns(path):`                     waits for others at a file that all of them only read

Why not `filelock`: its flock says neither who holds it nor since when, and an NFS mount that answers ENOLCK is an
error to it; its marker files name pid and host, but need somebody to judge that a killed process is gone.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megatron_encdec.platform.errors import UserError

NAME = "run.lock"
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """A process: where it runs, since when, and what it was called as. `started` tells a reused pid apart."""

    host: str
    boot: str
    pid: int
    started: int  # clock ticks after boot
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Self:
        """This one."""
        return cls(socket.gethostname(), _boot_id(), os.getpid(), _start_ticks(os.getpid()),
                   time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(sys.argv)[:500])

    @property
    def is_gone(self) -> bool:
        """Whether it certainly runs no more; that can be known on its own host only."""
        return self.host == socket.gethostname() and (
            self.boot != _boot_id() or _start_ticks(self.pid) != self.started)

    def __str__(self):
        return f"pid {self.pid} on {self.host} since {self.since} ({self.command})"


class InUse(UserError):
    """Another process holds the folder; `holder` says who, None where the lock file does not."""

    def __init__(self, message: str, holder: Holder | None):
        super().__init__(message)
        self.holder = holder


class FolderLock:
    """Holds `folder` for this process as long as the context lasts; made where missing. option: what users name it by.
    note: of a stale lock that was found. Raises `InUse` where another process holds it, another `UserError` where it
    cannot be written."""

    def __init__(self, folder: str | Path, option: str = "run.dir"):
        self._folder, self._option = Path(folder), option
        self._path = self._folder / NAME
        self.note: str | None = None

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self._option}: {self._folder} cannot be written to ({error.strerror}); "
                            "make it writable, or name another") from None
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_exception):
        with contextlib.suppress(OSError):  # a disk that went away must not hide why the work ends
            os.ftruncate(self._descriptor, 0)  # not unlinked: a waiting launch would hold a file without a name
        os.close(self._descriptor)

    def _take(self) -> None:
        locked = self._flock()
        found = self._read()
        if locked is False or (locked is None and found is not None and not found.is_gone):
            stuck = f"; if it runs no more, delete {self._path}" if locked is None else ""
            raise self._in_use(f"is in use by {found or 'another process'}; wait for it, end it, or name another "
                               f"{self._option}{stuck}", found)
        if not os.path.exists(self._path) or not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
            raise self._in_use("was removed just now by a process that is done with it; try again", None)
        if found is not None:
            self.note = f"took over the lock of a launch that ended without letting go: {found}"
        ours = Holder.this_process()
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(asdict(ours), indent=2).encode() + b"\n", 0)
            os.fsync(self._descriptor)
        except OSError as error:
            raise UserError(f"{self._option}: {self._path} cannot be written ({error.strerror})") from None
        if locked is None and (last := self._read()) != ours:  # two launches at once: the last to write has it
            raise self._in_use(f"was taken just now by {last}", last)

    def _in_use(self, what: str, holder: Holder | None) -> InUse:
        return InUse(f"{self._option}: {self._folder} {what}", holder)

    def _flock(self) -> bool | None:
        """True: ours. False: another process holds it. None: this file system knows no flock."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return None
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        return True

    def _read(self) -> Holder | None:
        """Who stands in the file; None where nobody does, or nothing readable."""
        try:
            return Holder(**json.loads(os.pread(self._descriptor, 1 << 16, 0)))
        except (ValueError, TypeError):
            return None


@contextlib.contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Hold the flock of the file at `path`, once others let go: every reader may, and no file is left behind."""
    with open(path, "rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks: each works for itself
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> int:
    """When process `pid` started, in clock ticks after boot; -1 where there is none, or none that can be seen."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return -1
