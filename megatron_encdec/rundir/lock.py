"""One launch at a time in a folder: the second one is refused and told who holds it.

`run.lock` says who holds the folder, and a thread of the holder counts up a number in it, its heartbeat. Who wants the
folder decides by what stands there:

    nobody                                      taken, unless flock says that somebody is just beginning
    a process of this kernel that has ended     taken at once
    a process of this kernel that runs          refused at once
    anyone else (another host or container)     watched. Its heartbeat moves: refused. It has stood still for
                                                60 s by this process's own clock (`SECONDS`): taken, whatever flock says

flock alone does not do: there are mounts where it reaches no other host (Lustre's `localflock`, NFS's `local_lock`),
that know none, or where a server keeps it for a host that has lost its power. Two who take the folder in the same
moment both write; the last has it, and the other sees it when it looks again, as every holder does before it writes.

    1. `with FolderLock(folder, option) as lock:`     `lock.note` says whether a stale one was taken over
    2. `lock.claim.lost()`, `lock.claim.check()`      whether it is still ours; any process that sees the folder may ask
    3. `with taking_turns(path):`                     waits for others at a file that all of them only read

Why not `filelock`: its flock says neither who holds it nor since when, and an NFS mount that answers ENOLCK is an
error to it; its marker files name pid and host, but need somebody to judge that a killed process is gone.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.ranks import seconds_of

NAME = "run.lock"
BEAT_SECONDS = 5.0  # between heartbeats
SECONDS = "MEGATRON_ENCDEC_LOCK_SECONDS"  # variable: how long one stands still until its holder elsewhere counts as
#                                          ended; 60, since a server that fails over takes as long
_LOOK_SECONDS = 0.5  # between looks at a heartbeat
_SAY_SECONDS = 30.0  # between lines while waiting
_DIGITS = 12  # room for the heartbeat's: every one is written over the one before, in one piece
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# path of a lock -> what stood there and since when, by this process's clock; kept from one attempt to the next
_watched: dict[str, tuple["Holder", float]] = {}


@dataclass(frozen=True)
class Holder:
    """A process: where it runs, since when, and what it was called as. `started` tells a reused pid apart, `token` two
    holds of one process; `job` and `restarts` are Slurm's. `beat` counts up as long as it holds the folder."""

    host: str
    boot: str
    pids: str  # the namespace that its pid is of
    pid: int
    started: int  # clock ticks after boot
    since: str
    command: str
    job: str
    restarts: int
    token: str
    beat: int = 0

    @classmethod
    def this_process(cls) -> Self:
        """This one."""
        return cls(socket.gethostname(), _boot_id(), _pid_namespace(), os.getpid(), _start_ticks(os.getpid()),
                   time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(sys.argv)[:500], os.environ.get("SLURM_JOB_ID", ""),
                   int(os.environ.get("SLURM_RESTART_COUNT") or 0), secrets.token_hex(8))

    @property
    def is_here(self) -> bool:
        """Whether its pid means something to this process: containers of a host share its boot, not this."""
        ours = (socket.gethostname(), _boot_id(), _pid_namespace())
        return all(ours) and ours == (self.host, self.boot, self.pids)

    @property
    def runs_here(self) -> bool:
        """Whether it is a process of this kernel that has not ended."""
        return self.is_here and _start_ticks(self.pid) == self.started

    @property
    def is_earlier_life(self) -> bool:
        """Whether it is of this very job before its requeue: Slurm has ended it, or is about to."""
        ours = os.environ.get("SLURM_JOB_ID", "")
        return self.job == ours != "" and self.restarts < int(os.environ.get("SLURM_RESTART_COUNT") or 0)

    def __str__(self):
        return f"pid {self.pid} on {self.host} since {self.since} ({self.command})"


class InUse(UserError):
    """Another process holds the folder; `holder`, or `who` for people, says which, None where the lock file does not.
    is_certain: it runs; else that is still to be found out by its heartbeat."""

    def __init__(self, message: str, holder: Holder | None, is_certain: bool = True):
        super().__init__(message)
        self.holder, self.is_certain = holder, is_certain
        self.who = str(holder or "another process")


class Claim:
    """A hold on a folder, to be looked at again before its files are written. It pickles: other ranks look too."""

    def __init__(self, path: Path, token: str):
        self._path, self._token = path, token

    def lost(self) -> str | None:
        """None while the lock file says that the folder is held by this claim, else what it says instead. A disk that
        does not answer is no loss: whoever writes there will see."""
        try:
            holder = _read(self._path)
        except FileNotFoundError:
            return f"{self._path}: is not there any more"
        except OSError:
            return None
        ours = holder is not None and holder.token == self._token
        return None if ours else f"{self._path}: is now held by {holder or 'nobody'}"

    def check(self) -> None:
        """Raises `InUse` where it is lost."""
        if why := self.lost():
            raise InUse(f"{why}; this process held it before, and stops without writing more", _holder_at(self._path))

    def appears(self, seconds: float) -> bool:
        """Whether the lock file of this claim can be seen from here, or can within `seconds`."""
        limit = time.monotonic() + seconds
        while self.lost():
            if time.monotonic() > limit:
                return False
            time.sleep(0.1)
        return True


class FolderLock:
    """Holds `folder` for this process as long as the context lasts; made where missing. option: what users name it by.
    patience: seconds to wait for a holder that is known to run; None: not even to find out whether it does. stop: ends
    the waiting. note: of a stale lock that was taken over. Raises `InUse` where another process holds it, another
    `UserError` where it cannot be written."""

    def __init__(self, folder: str | Path, option: str = "run.dir", patience: float | None = 0.0,
                 stop: Callable[[], bool] = lambda: False):
        self._folder, self._option, self._patience, self._stop = Path(folder), option, patience, stop
        self._path, self._still = self._folder / NAME, seconds_of(SECONDS, 60, 3 * BEAT_SECONDS)
        self.note: str | None = None

    def __enter__(self) -> Self:
        began, said = time.monotonic(), -math.inf
        while True:
            try:
                self._attempt()
                break
            except InUse as refused:
                now = time.monotonic()
                if self._stop() or now - began > self._waits(refused):
                    raise
                if now - said >= _SAY_SECONDS and not self._patience:
                    said = now
                    self._say_why(refused.holder)
            time.sleep(_LOOK_SECONDS)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception):
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):  # a disk that went away must not hide why the work ends
            if not self.claim.lost():
                os.ftruncate(self._descriptor, 0)  # not unlinked: a waiting launch would hold a file without a name
        os.close(self._descriptor)

    def _waits(self, refused: InUse) -> float:
        """Seconds from the first attempt until `refused` is the answer."""
        if self._patience is None:
            return -1.0
        if not refused.is_certain or (refused.holder and refused.holder.is_earlier_life):
            return math.inf  # which ends by itself
        return self._patience or -1.0

    def _say_why(self, holder: Holder) -> None:
        then = ("this job's earlier life; waiting for its end" if holder.is_earlier_life else
                f"its heartbeat is watched, and the folder taken over if that stands still for {self._still:.0f} s")
        print(f"megatron-encdec: {self._option}: {self._folder} is held by {holder}: {then}", file=sys.stderr,
              flush=True)

    def _attempt(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self._option}: {self._folder} cannot be written to: it is no folder, or lies in "
                            "none; name another") from None
        except OSError as error:
            raise UserError(f"{self._option}: {self._folder} cannot be written to ({error.strerror}); "
                            "make it writable, or name another") from None
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take(self) -> None:
        locked, asked = self._flock(), time.monotonic()
        found = _holder_at(self._path)
        runs = found is not None and found.runs_here
        if found is not None and (not found.is_here or (runs and locked)):
            self._watch(found, time.monotonic() - asked)
        elif runs or locked is False:
            raise self._in_use(f"is in use by {found or 'another process'}", found)
        if not os.path.exists(self._path) or not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
            raise InUse(f"{self._option}: {self._folder} was removed just now by a process that is done with it; try "
                        "again", None)
        if found is not None:
            still = "" if found.is_here else f" (its heartbeat stood still for {self._still:.0f} s)"
            self.note = f"took over the lock of a launch that ended without letting go: {found}{still}"
        self._holder = Holder.this_process()
        self.claim = Claim(self._path, self._holder.token)
        self._bytes = max(len(_text(self._holder)) + _DIGITS, os.fstat(self._descriptor).st_size)
        try:
            self._write()
        except OSError as error:
            raise UserError(f"{self._option}: {self._path} cannot be written ({error.strerror})") from None
        if self.claim.lost():  # two launches at once: the last to write has it
            holder = _holder_at(self._path)
            raise self._in_use(f"was taken just now by {holder or 'another process'}", holder)

    def _watch(self, found: Holder, seconds: float) -> None:
        """Return where the heartbeat of `found` has stood still for long enough; else `InUse`. seconds: of this look;
        where the disk did not answer us, it did not answer the holder either."""
        before, since = _watched.get(str(self._path), (None, 0.0))
        moves = before is not None and before.token == found.token and before.beat != found.beat
        if before != found or seconds > BEAT_SECONDS:
            since = time.monotonic()
            _watched[str(self._path)] = found, since
        if time.monotonic() - since < self._still:
            raise self._in_use(f"is in use by {found}", found, is_certain=moves)

    def _in_use(self, what: str, holder: Holder | None, is_certain: bool = True) -> InUse:
        return InUse(f"{self._option}: {self._folder} {what}; wait for it, end it, or name another {self._option}",
                     holder, is_certain)

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

    def _write(self) -> None:
        """Over all that stood there, in one piece: no reader sees half of it, or nobody's name."""
        os.pwrite(self._descriptor, _text(self._holder).ljust(self._bytes), 0)
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if not self.claim.lost():
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                with contextlib.suppress(OSError):  # a full disk, or one that is away: the next one may be seen
                    self._write()


@contextlib.contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Hold the flock of the file at `path`, once others let go: every reader may, and no file is left behind."""
    with open(path, "rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks: each works for itself
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=2).encode() + b"\n"


def _read(path: Path) -> Holder | None:
    """Who stands in the file; None where nobody does, or nothing readable. It is opened anew each time: then a network
    file system asks its server."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return None


def _holder_at(path: Path) -> Holder | None:
    """The same; nobody where the file cannot be read."""
    try:
        return _read(path)
    except OSError:
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_ticks(pid: int) -> int:
    """When process `pid` started, in clock ticks after boot; -1 where there is none, or none that can be seen."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return -1
