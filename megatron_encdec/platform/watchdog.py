"""No silent hang: a rank that gives no sign of life, or that all others wait for, is named and the job ended.

    1. `mark(what)`        the main thread says what it begins: a step, reading samples, a save
    2. a thread            sends these marks and a beat of its own to a small store on rank 0
    3. another thread      looks whether everyone beats and whether this rank's main thread gets on

Who is named: a rank whose beats have stopped (stopped, its node gone, no processor time); else, when all threads
beat but rank 0 has had no new mark for too long, the ranks that have made the fewest marks: the others wait for
them in a collective. If rank 0 itself does not answer, every other rank says so. Works over gloo and NCCL alike.

Why not torch's own timeouts: they end a collective without naming the rank that is missing, and see nothing of one that
hangs outside of collectives.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import torch.distributed as dist

from megatron_encdec.platform.distributed import Control

LONG = 3600.0  # seconds for what may take long by nature: loading, waiting for a disk
# What the main thread of this process is at; written by it alone.
_progress = SimpleNamespace(marks=0, what="starting", since=time.monotonic(), limit=None)


def mark(what: str, limit: float | None = None) -> None:
    """`what` begins. limit: seconds it may take where that is more than the watchdog's own timeout."""
    # that other threads get on does not mean that training does
    if threading.current_thread() is threading.main_thread():
        _progress.limit, _progress.what, _progress.since = limit, what, time.monotonic()
        _progress.marks += 1


class Watchdog:
    """Watches the ranks of a job until `close`; made collectively. Does nothing for one rank. timeout: seconds without
    a sign of life, or without a new mark, that mean a hang."""

    def __init__(self, control: Control, timeout: float):
        self._rank, self._ranks, self._timeout = dist.get_rank(), dist.get_world_size(), timeout
        self._every = min(5.0, timeout / 6)
        self._closed = threading.Event()
        if self._ranks == 1:
            return
        host = os.environ.get("MASTER_ADDR", "localhost")
        first = self._rank == 0
        server = dist.TCPStore(host, 0, None, True, timedelta(seconds=60), False) if first else None
        port = control.from_first(lambda: server.port)
        self._store = server or dist.TCPStore(host, port, None, False, timedelta(seconds=60), False)
        self._names = control.gathered(f"rank {self._rank} (pid {os.getpid()} on {socket.gethostname()})")
        self._beats: list[dict] = [{} for _ in range(self._ranks)]  # as last heard
        self._heard = [time.monotonic()] * self._ranks  # when a beat differed from the one before
        mark("starting")
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _beat(self) -> None:
        """Send our beat, hear the others'; blocks for as long as rank 0 does not answer."""
        number, listen = 0, range(self._ranks) if self._rank == 0 else (0,)
        with contextlib.suppress(RuntimeError):  # rank 0 is gone: its end is seen by the process groups
            while not self._closed.wait(self._every):
                number += 1
                beat = {"number": number, "marks": _progress.marks, "what": _progress.what}
                self._store.set(f"beat/{self._rank}", json.dumps(beat))
                for rank in listen:
                    if self._store.check([f"beat/{rank}"]):
                        beat = json.loads(self._store.get(f"beat/{rank}"))
                        if beat != self._beats[rank]:
                            self._beats[rank], self._heard[rank] = beat, time.monotonic()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._every):
            now = time.monotonic()
            if now - last > 2 * self._every + 1:  # this process itself was stopped for a while: count from here
                _progress.since, self._heard = now, [now] * self._ranks
            last = now
            finding = self._finding(now)
            if finding and not self._closed.is_set():
                print(f"megatron-encdec: {finding}; ending the job (run.hang_timeout={self._timeout:g} s). The same "
                      "command continues from the newest checkpoint", file=sys.stderr, flush=True)
                os._exit(1)

    def _finding(self, now: float) -> str | None:
        silent = [rank for rank in range(self._ranks) if now - self._heard[rank] > self._timeout]
        if self._rank:  # only rank 0 is heard here, and it is the one that looks at all others
            late = now - self._heard[0] > self._timeout + 2 * self._every
            return self._silence([0], now) if late else None
        if silent and silent != list(range(self._ranks)):
            return self._silence([rank for rank in silent if rank], now)
        limit = max(self._timeout, _progress.limit or 0) + 2 * self._every
        if now - _progress.since > limit:
            return self._standstill(now)
        return None

    def _silence(self, ranks: list[int], now: float) -> str:
        return "; ".join(f"{self._names[rank]} hangs: no sign of life for {now - self._heard[rank]:.0f} s, "
                         f"last at: {self._beats[rank].get('what', 'starting')}" for rank in ranks)

    def _standstill(self, now: float) -> str:
        counts = [beat.get("marks", 0) for beat in self._beats]
        behind = [rank for rank in range(self._ranks) if counts[rank] == min(counts)]
        for_ = f"nothing has moved for {now - _progress.since:.0f} s"
        if len(behind) == self._ranks:
            return f"{for_} on any rank, all at: {self._beats[0].get('what')}; none is behind the others"
        return f"{for_}: " + "; ".join(f"{self._names[rank]} hangs at: {self._beats[rank].get('what')}"
                                       for rank in behind[:8]) + "; the others wait for it"
