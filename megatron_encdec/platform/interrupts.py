"""Where an interrupt (^C) may not become an exception."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def interrupts_end_the_process():
    """While modules are imported, ^C ends the process by the signal, as it would a C program.

    Nothing is under way yet that could be lost, and a `KeyboardInterrupt` inside an extension module's initialisation
    is more than some can take: orjson's crashes. Only in the main thread, and only where ^C would raise it.
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
