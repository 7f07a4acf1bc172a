"""Signals: those that ask to stop, noted; Ctrl-C while modules are imported; how a process ended, in words.

    1. `with StopSignals() as signals:`     `signals.received` is the first one's number, or None
    2. `with interrupts_end_the_process():` around imports
    3. `how_it_ended(code)`                 of a child's exit code
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

REPEAT_SECONDS = 1.0  # a signal that comes again sooner is the same one (to a process group and forwarded as well)


class StopSignals:
    """Notes the signals `numbers` as long as the context lasts. In another thread than the main one, to which Python
    gives no signals, it does nothing.

    The kernel's handler writes a byte to a pipe; a thread reads it. So a signal is seen at once even while the main
    thread waits in C code for another rank. received: the first one's number. all: every one's, in order. repeated:
    that of a second one, which ends this process at once if `second_ends`.
    """

    def __init__(self, numbers: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
                 second_ends: bool = False):
        self._numbers, self._second_ends = frozenset(numbers), second_ends
        self.all: list[int] = []
        self.received: int | None = None
        self.repeated: int | None = None
        self._action: Callable[[int], None] | None = None

    @contextlib.contextmanager
    def at_once(self, action: Callable[[int], None]) -> Iterator[None]:
        """As long as the context lasts, the first signal (now, if it has come) also calls `action(number)`, in another
        thread; so does a Ctrl-C that the main thread has not taken after a second."""
        self._action = action
        if self.received:
            action(self.received)
        try:
            yield
        finally:
            self._action = None

    def __enter__(self) -> "StopSignals":
        self._listens = threading.current_thread() is threading.main_thread()
        if not self._listens:
            return self
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)  # where they were held back until now
        return self

    def __exit__(self, *_exception):
        if not self._listens:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._write)  # the thread reads the end of the pipe and ends
        self._thread.join()

    def _listen(self, read: int) -> None:
        while data := os.read(read, 64):
            for number in self._numbers.intersection(data):
                self._note(number)
            if signal.SIGINT in data and signal.SIGINT not in self._numbers and self._action:
                time.sleep(1.0)
                if self._action:
                    self._action(signal.SIGINT)
        os.close(read)

    def _note(self, number: int) -> None:
        self.all.append(number)
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = number, now
            if self._action:
                self._action(number)
        elif now - self._first >= REPEAT_SECONDS:
            self.repeated = number
            if self._second_ends:
                print(f"megatron-encdec: a second {signal.Signals(number).name}: ending at once, without a checkpoint",
                      file=sys.stderr, flush=True)
                os._exit(128 + number)


@contextlib.contextmanager
def interrupts_end_the_process():
    """While modules are imported, Ctrl-C ends the process by the signal, as it would a C program.

    Nothing is under way yet that could be lost, and a `KeyboardInterrupt` inside an extension module's initialisation
    is more than some can take: orjson's crashes. Only in the main thread, and only where Ctrl-C would raise it.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def how_it_ended(code: int) -> str:
    """"was killed by SIGKILL", "ended with exit code 1": of `code` as Python has it, negative for a signal."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
