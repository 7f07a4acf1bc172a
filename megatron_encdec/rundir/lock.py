"""One launch to a run directory: the second one is refused and told who holds it.

`run.lock` is held with flock, which the system lets go of when its process ends, however it ends. Its content says
who that is, for people. Where the file system knows no flock, the content decides alone: a holder on this host
that is no longer running (another boot, no such pid, or a pid used anew) holds nothing.

    1. `with RunLock(run_directory) as lock:`     on rank 0 only; `lock.note` says whether a stale one was found
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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
    def this_process(cls) -> "Holder":
        """The one that asks."""
        return cls(socket.gethostname(), _boot_id(), os.getpid(), _start_ticks(os.getpid()),
                   time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(sys.argv)[:500])

    @property
    def is_gone(self) -> bool:
        """Whether it certainly runs no more; that can be known on its own host only."""
        here = Holder.this_process()
        if self.host != here.host:
            return False
        return self.boot != here.boot or _start_ticks(self.pid) != self.started

    def __str__(self):
        return f"pid {self.pid} on {self.host} since {self.since} ({self.command})"


class InUse(UserError):
    """Another process holds the directory; `holder` says who, None where the lock file does not."""

    def __init__(self, message: str, holder: Holder | None):
        super().__init__(message)
        self.holder = holder


class RunLock:
    """Holds `directory` for this process as long as the context lasts; made where missing.

    Raises `InUse` where another launch holds it (host, pid, start, command), another `UserError` where the directory
    cannot be written.
    """

    def __init__(self, directory: Path):
        self._path = Path(directory) / NAME
        self._descriptor: int | None = None
        self.note: str | None = None

    def __enter__(self) -> "RunLock":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"run.dir: {self._path.parent} cannot be written to ({error.strerror}); "
                            "make it writable, or name another") from None
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = None
            raise
        return self

    def __exit__(self, *_exception):
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # a disk that went away must not hide why the run ends
            os.ftruncate(self._descriptor, 0)  # not unlinked: a waiting launch would hold a file without a name
        os.close(self._descriptor)
        self._descriptor = None

    def _take(self) -> None:
        locked = self._flock()
        found = self._read()
        if locked is False or (locked is None and found is not None and not found.is_gone):
            raise InUse(f"run.dir: {self._path.parent} is in use by {found or 'another process'}; wait for it, "
                        f"end it, or train in another run.dir{self._if_stuck(locked)}", found)
        if found is not None:
            self.note = f"took over the lock of a launch that ended without letting go: {found}"
        ours = Holder.this_process()
        data = json.dumps(asdict(ours), indent=2).encode() + b"\n"
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, data, 0)
            os.fsync(self._descriptor)
        except OSError as error:
            raise UserError(f"run.dir: {self._path} cannot be written ({error.strerror})") from None
        if locked is None and (last := self._read()) != ours:  # two launches at once: the last to write has it
            raise InUse(f"run.dir: {self._path.parent} was taken just now by {last}", last)

    def _if_stuck(self, locked: bool | None) -> str:
        return "" if locked is False else f"; if it runs no more, delete {self._path}"

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
