"""Child processes that answer what they are asked, each with a function made there once.

    1. `Child()`               one; `begin` tells it what to make of items, `send` gives it one, `receive` its answer
    2. `with Pool(n) as pool`  several; `pool.map_ordered(items)` yields the answers in the items' order
    3. `tell(message)`         in a child: what the parent receives before the answer

A child ends at once when its pipe closes, also in the middle of an item: so it does when its parent was killed with
SIGKILL. SIGTERM unwinds the item in hand first. Ctrl-C reaches the parent alone, which decides.

Why not `multiprocessing`: its spawned children import the caller's main module again, which fails for a script without
a main guard or read from standard input; forked children inherit the threads of Rust libraries.
"""

import os
import pickle
import pkgutil
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.signals import how_it_ended

LOOK_AHEAD_PER_CHILD = 3  # one being worked on, one waiting, one finished: bounds the parent's memory
_parent: Connection | None = None  # of this process, where it is a child


def available_cores() -> int:
    """Cores that this process may run on (a container's or a job's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Processes that this thread starts meanwhile run on `cores` alone, where the system can say so; none: on all."""
    confine = getattr(os, "sched_setaffinity", None)
    if confine is None or not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    confine(0, cores)
    try:
        yield
    finally:
        confine(0, before)


def start_python(call: str, descriptors: Sequence[int], environment: Mapping[str, str], **options) -> subprocess.Popen:
    """A new process of this interpreter that does `from megatron_encdec.<call>`, with the open `descriptors`. It never
    sees an interrupt from the keyboard. options: of Popen."""
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", **environment}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # not even starting
    try:
        return subprocess.Popen([sys.executable, "-c", f"from megatron_encdec.{call}"], pass_fds=descriptors,
                                env=variables, stdin=subprocess.DEVNULL, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Child:
    """One process; what it prints goes to standard error. threads: of its libraries. environment: what it sees beside,
    or instead of, this process's variables. connection: ready when there is something to `receive`."""

    def __init__(self, threads: int = 1, environment: Mapping[str, str] | None = None):
        ours, theirs = socket.socketpair()
        with theirs:
            call = f"platform.children import main; main({theirs.fileno()})"
            self.process = start_python(call, [theirs.fileno()], {
                "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads),
                **(environment or {})}, stdout=2)
        self.connection = Connection(ours.detach())

    def begin(self, make: str, arguments: tuple) -> None:
        """Have it answer items with what `make` ("module:function") returns, called once, at the first item."""
        self.send((make, arguments))

    def send(self, item: Any) -> None:
        """Give it something to do; that it has ended is found out by `receive`."""
        with suppress(OSError):
            self.connection.send(item)

    def receive(self) -> tuple[str, Any] | None:
        """("told", message), ("answer", its answer), or None where the process has ended. Raises a `UserError` of its
        function as such, any other exception as a `RuntimeError` with the child's traceback."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            return None
        if kind == "user error":
            raise UserError(content)
        if kind == "error":
            raise RuntimeError(f"in a child process:\n{content}")
        return kind, content

    def close(self) -> str:
        """Close its pipe and wait for its end; in words, how it ended."""
        self.connection.close()
        code = self.process.wait()
        often = " (most often the system running out of memory)" if code == -signal.SIGKILL else ""
        return how_it_ended(code) + often


class Pool(AbstractContextManager):
    """`count` children, started at once; a context manager that ends them."""

    def __init__(self, count: int):
        self.children = [Child() for _ in range(count)]
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()

    def begin(self, make: str, arguments: tuple) -> Self:
        for child in self.children:
            child.begin(make, arguments)
            self._idle.put(child)
        return self

    def __exit__(self, *_) -> None:
        for child in self.children:
            child.close()

    def map_ordered(self, items: Iterable[Any]) -> Iterator[Any]:
        """The answer to each item, in order; at most a few items per child are taken ahead.
        Raises what `Child.receive` raises, and `UserError` where a child dies."""
        pending: deque = deque()
        with ThreadPoolExecutor(len(self.children)) as threads:
            try:
                for item in items:
                    pending.append(threads.submit(self._ask, item))
                    if len(pending) >= LOOK_AHEAD_PER_CHILD * len(self.children):
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            except BaseException:
                for future in pending:
                    future.cancel()
                for child in self.children:  # wakes the threads that wait for an answer
                    child.process.send_signal(signal.SIGKILL)
                raise

    def _ask(self, item: Any) -> Any:
        child = self._idle.get()
        try:
            child.send(item)
            while (message := child.receive()) and message[0] == "told":
                pass
        finally:
            self._idle.put(child)
        if message is None:
            raise UserError(f"a worker process {child.close()}; try fewer workers")
        return message[1]


class _Stopped(BaseException):
    """SIGTERM came in the middle of an item. No `Exception`: no handler in a library may take it for a failure."""


def main(descriptor: int) -> None:
    """Answer items until the pipe closes or SIGTERM comes."""
    global _parent
    _parent, received = Connection(descriptor), queue.SimpleQueue()
    threading.Thread(target=_listen, args=(_parent, received), daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)
    answerer = None
    try:
        begin = received.get()
        while True:
            item = received.get()
            try:
                if answerer is None:
                    make, arguments = pickle.loads(begin)
                    answerer = pkgutil.resolve_name(make)(*arguments)
                answer = "answer", answerer(pickle.loads(item))
            except UserError as error:
                answer = "user error", str(error)
            except Exception:  # whatever it is, the parent raises it
                answer = "error", traceback.format_exc()
            _parent.send(answer)
    except (_Stopped, OSError):  # at once: libraries' exit handlers may wait for threads
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _listen(parent: Connection, received: queue.SimpleQueue) -> None:
    try:
        while True:
            received.put(parent.recv_bytes())  # read by the main thread: two that import at once may meet halfway
    except (EOFError, OSError):
        os._exit(1)  # nobody would take the answer


def _stop(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: a second must not interrupt the unwinding
    raise _Stopped


def tell(message: Any) -> None:
    """In a child: let the parent know of something before the answer."""
    _parent.send(("told", message))
