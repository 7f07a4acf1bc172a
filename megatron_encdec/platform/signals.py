"""SIGTERM and SIGUSR1 ask a rank to save and end; a second one ends it at once.

The kernel's handler writes a byte to a pipe; a thread reads it. So a signal is seen at once even while the main
thread waits in C code for another rank.

    1. `with StopSignals() as signals:`     from the start of a rank to its end
    2. `signals.received`                   the first one's number, or None
"""

import os
import signal
import sys
import threading
import time

from megatron_encdec.platform.launcher import REPEAT_SECONDS

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Catches the signals as long as the context lasts; main thread only."""

    def __init__(self):
        self.received: int | None = None
        self._first = 0.0

    def __enter__(self) -> "StopSignals":
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in NUMBERS}
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)  # held back since the launcher started this rank
        self._thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception):
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._write)  # the thread reads the end of the pipe and ends
        self._thread.join()

    def _listen(self, read: int) -> None:
        while data := os.read(read, 64):
            for number in data:
                if number in NUMBERS:
                    self._note(number)
        os.close(read)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = number, now
        elif now - self._first >= REPEAT_SECONDS:
            print(f"megatron-encdec: a second {signal.Signals(number).name}: ending at once, without a checkpoint",
                  file=sys.stderr, flush=True)
            os._exit(128 + number)
