"""The sweep's side of its workers: start them, give them runs, hear what becomes of them.

    1. `Worker(slot, devices, threads)`     starts a process
    2. `give(function, cell)`               a run, to an idle worker
    3. `connection`                         to wait on; `receive()` gives a message, or None when the process ended
    4. `stop()`, `kill()`                   SIGTERM, SIGKILL
"""

import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class Worker:
    """One process, and the cell that it works on (None: idle)."""

    def __init__(self, slot: int, gpu: str | None, threads: int):
        """`gpu`: the one that it sees, None for those that this process sees. `threads`: of torch, on a CPU."""
        self.slot, self.cell, self.group, self.step = slot, None, None, None
        self.began = 0.0
        ours, theirs = socket.socketpair()
        paths = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1",
                       "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "megatron_encdec.finetune.sweep_worker", str(theirs.fileno())]
        # Ctrl-C reaches the whole group, but it is the sweep that decides: workers never see it, not even starting.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with theirs:
                self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment,
                                                stdin=subprocess.DEVNULL, stdout=sys.stderr)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.connection = Connection(ours.detach())

    def give(self, function: str, cell: Any, group: Any) -> None:
        """Have it run `cell`; a worker that has just died is found out by `receive`."""
        self.cell, self.group, self.step, self.began = cell, group, None, time.monotonic()
        try:
            self.connection.send((function, cell))
        except OSError:
            pass

    def receive(self) -> tuple[str, Any] | None:
        """The next message, once `connection` is ready; None: the process ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def stop(self) -> None:
        """Ask it to give up its run and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> str:
        """Wait for its end; how it ended, in words."""
        self.connection.close()
        code = self.process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            return f"by {name}{' (most often the system running out of memory)' if name == 'SIGKILL' else ''}"
        return f"with exit code {code}"
