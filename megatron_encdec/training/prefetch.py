"""Micro-batches on their way to the device: made ahead by a thread, in memory that a GPU can read by itself.

    1. `staged(batches, ahead)`    the same micro-batches in the same order, some ready before they are asked for
    2. `Staged.tensor(name)`       an array of one, on the device

Order and content do not depend on `ahead`: one thread draws from one iterator and puts into one queue. Nothing is drawn
that belongs to a later step, so a stop leaves nothing behind.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator

import torch

from megatron_encdec.objectives import MicroBatch
from megatron_encdec.platform.device import device, device_type
from megatron_encdec.platform.watchdog import mark

_ARRAYS = ("inputs_BS", "label_positions_N", "labels_N", "cu_seqlens")
_LOOK_SECONDS = 0.2  # how soon the thread sees that nobody wants any more


class Staged:
    """A micro-batch whose arrays can be had as tensors on the device; from pinned memory the copy waits for nobody."""

    def __init__(self, batch: MicroBatch):
        self.batch = batch
        self._host = {name: torch.from_numpy(getattr(batch, name)) for name in _ARRAYS}
        if device_type() == "cuda":
            self._host = {name: tensor.pin_memory() for name, tensor in self._host.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The array `name` on this rank's device."""
        return self._host[name].to(device(), non_blocking=True)


@contextlib.contextmanager
def staged(batches: Iterator[MicroBatch], ahead: int) -> Iterator[Iterator[Staged]]:
    """`batches`, up to `ahead` of them prepared by a thread (0: each when it is asked for, without a thread).
    What goes wrong while one is prepared is raised where it is asked for."""
    if ahead == 0:
        yield map(Staged, batches)
        return
    waiting: queue.Queue = queue.Queue(maxsize=ahead)
    over = threading.Event()

    def put(item) -> bool:
        while not over.is_set():
            try:
                waiting.put(item, timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def prepare() -> None:
        try:
            if device_type() == "cuda":
                torch.cuda.set_device(device())  # pinned memory belongs to a device's context
            for batch in batches:
                if not put((Staged(batch), None)):
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    def ready() -> Iterator[Staged]:
        while True:
            mark("waiting for the next micro-batch")
            one, error = waiting.get()
            if error is not None:
                raise error
            if one is None:
                return
            mark(f"computing samples {one.batch.samples[0]}..{one.batch.samples[-1]}")
            yield one

    thread = threading.Thread(target=prepare, name="micro-batches", daemon=True)
    thread.start()
    try:
        yield ready()
    finally:
        over.set()
        thread.join()
