"""The process of one tracker: takes points from a pipe until it ends, and hands them on in portions.

    1. a thread reads the pipe into a queue of at most QUEUED points; where that is full the pipe fills up, and the
       sender drops
    2. the main thread makes the tracker (tracker_kinds.py) and gives it what waits
    3. once the pipe has ended, the process ends when all is written, or after LAST seconds

Signals for the run are not for it: it ends when the run has.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from typing import NamedTuple

QUEUED = 10_000  # points
PORTION = 100  # points handed on at once, at most
LAST = 90.0  # seconds after the run's end, however it ended


class Point(NamedTuple):
    """Values after a step, and how many tokens were read by then."""

    step: int
    tokens: int
    values: dict[str, float]


def main(name: str, points: int, said: int, directory: str, step: int) -> None:
    """Be the tracker `name` of the run in `directory`, which goes on after `step`; points and said: descriptors."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    waiting: queue.Queue[Point | None] = queue.Queue(QUEUED)
    threading.Thread(target=_read, args=(points, waiting), daemon=True).start()

    def say(line: str) -> None:
        os.write(said, " ".join(line.split())[:1000].encode() + b"\n")

    try:
        _work(name, waiting, directory, step, say)
    except BaseException as error:  # whatever a tracker raises, training goes on
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        say(f"gave up ({_reason(error)}); training goes on without it, metrics.jsonl has everything")
        os._exit(1)  # at once: exit handlers of libraries may wait


def _work(name: str, waiting: queue.Queue, directory: str, step: int, say) -> None:
    from megatron_encdec.training.tracker_kinds import KINDS

    tracker = KINDS[name](directory, step, say)
    ended = False
    while not ended:
        portion = [waiting.get()]
        while len(portion) < PORTION and not waiting.empty():
            portion.append(waiting.get())
        ended = portion[-1] is None
        if found := portion[:-1] if ended else portion:
            tracker.log(found)
    tracker.finish()


def _read(descriptor: int, waiting: queue.Queue) -> None:
    with open(descriptor, "rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):  # else the run was killed while it wrote it
                waiting.put(Point(*json.loads(line)))
    threading.Thread(target=_end, daemon=True).start()
    waiting.put(None)


def _end() -> None:
    time.sleep(LAST)
    os._exit(1)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, ModuleNotFoundError):
        from megatron_encdec.platform.optional import install_command

        package = (error.name or "").partition(".")[0]
        return f"the package {package} is not installed: {install_command(package)}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
