"""Worker processes that answer questions in the order they were asked.

    1. `Workers(count)`               starts Python processes
    2. `begin(factory, arguments)`    each calls `factory(*arguments)` once
    3. `map_ordered(items)`           sends items to whoever is free, yields the answers in input order
    4. `main()`                       the loop of a worker: receive, answer, until the pipe closes

Why not `multiprocessing`: its spawned children import the caller's main module again, which fails for a
script without a main guard or read from standard input, and forked children inherit the threads of Rust
libraries. A worker that lost its parent sees the pipe close and ends, also after kill -9.
"""

import importlib
import os
import queue
import signal
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from megatron_encdec.platform.errors import UserError

LOOK_AHEAD_PER_WORKER = 3  # one being worked on, one waiting, one finished: bounds the parent's memory


def available_cores() -> int:
    """Cores that this process may run on (a container's or a job's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` processes, each holding the function that a factory ("package.module:function") returned there.

    They start at once and wait for `begin`. Use as a context manager; leaving it ends the processes. Raises
    `UserError` when a process dies (killed by the system for its memory, say), and re-raises there a `UserError` of
    the function; any other exception of the function becomes a `RuntimeError` with the worker's traceback.
    """

    def __init__(self, count: int):
        self.count = count
        self._processes: list[subprocess.Popen] = []
        self._idle: queue.SimpleQueue[tuple[subprocess.Popen, Connection]] = queue.SimpleQueue()
        self._connections: list[Connection] = []
        for _ in range(count):
            process, connection = _start_process()
            self._processes.append(process)
            self._connections.append(connection)

    def begin(self, factory: str, arguments: tuple) -> Self:
        """Tell the processes what to make of the items: `factory(*arguments)`, called once in each."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            try:
                connection.send((factory, arguments))
            except OSError:
                raise _ended(process) from None
            self._idle.put((process, connection))
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self, kill: bool = False) -> None:
        """End the processes: by closing their pipes, or at once with `kill`."""
        for process in self._processes:
            if kill and process.poll() is None:
                process.kill()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.wait()

    def map_ordered(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the answer to each item, in order; at most a few items per worker are taken ahead."""
        pending: deque = deque()
        with ThreadPoolExecutor(len(self._processes)) as threads:
            try:
                for item in items:
                    pending.append(threads.submit(self._ask, item))
                    if len(pending) >= LOOK_AHEAD_PER_WORKER * len(self._processes):
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            except BaseException:
                for future in pending:
                    future.cancel()
                for process in self._processes:  # wakes the threads that wait for an answer
                    process.kill()
                raise

    def _ask(self, item: Any) -> Any:
        process, connection = self._idle.get()
        try:
            connection.send(item)
            kind, answer = connection.recv()
        except (EOFError, OSError):
            raise _ended(process) from None
        finally:
            self._idle.put((process, connection))
        if kind == "user error":
            raise UserError(answer)
        if kind == "error":
            raise RuntimeError(f"in a worker process:\n{answer}")
        return answer


def _ended(process: subprocess.Popen) -> UserError:
    return UserError(f"a worker process ended with exit code {process.wait()} (-9 is most often the system running "
                     "out of memory); try fewer workers")


def _start_process() -> tuple[subprocess.Popen, Connection]:
    ours, theirs = socket.socketpair()
    package_parent = str(Path(__file__).resolve().parents[2])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread a worker: the parallelism is the processes, and `--workers` means what it says.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1",
                   "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_encdec.text.workers", str(theirs.fileno())]
    # Ctrl-C reaches the whole group, but it is the parent that decides: workers never see it, not even starting.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with theirs:
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment,
                                       stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process, Connection(ours.detach())


def main() -> None:
    """A worker's life: build the function, answer items, end when the parent closes the pipe."""
    connection = Connection(int(sys.argv[1]))
    answer_item = None
    try:
        factory, arguments = connection.recv()
        while True:
            item = connection.recv()
            try:
                if answer_item is None:
                    module, _, function = factory.partition(":")
                    answer_item = getattr(importlib.import_module(module), function)(*arguments)
                answer = ("answer", answer_item(item))
            except UserError as error:
                answer = ("user error", str(error))
            except Exception:  # noqa: BLE001  (whatever it is, the parent raises it)
                answer = ("error", traceback.format_exc())
            connection.send(answer)
    except (EOFError, OSError):
        pass  # the parent is done, or gone


if __name__ == "__main__":
    main()
