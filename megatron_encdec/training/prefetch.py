"""Micro-batches on their way to the device: made ahead by a thread, in memory that a GPU can read by itself.

Order and content do not depend on `ahead`: one thread draws from one iterator. Nothing is drawn that belongs to a later
step, so a stop leaves nothing behind.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_encdec.objectives.base import MicroBatch
from megatron_encdec.platform.device import device, device_type
from megatron_encdec.platform.watchdog import mark

_ARRAYS = ("inputs_BS", "label_positions_N", "labels_N", "cu_seqlens")


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

    def begin() -> None:
        if device_type() == "cuda":
            torch.cuda.set_device(device())  # pinned memory belongs to a device's context

    def prepare() -> Staged | None:
        batch = next(batches, None)
        return None if batch is None else Staged(batch)

    def ready() -> Iterator[Staged]:
        while True:
            mark("waiting for the next micro-batch")
            one = pending.popleft().result()
            if one is None:
                return
            pending.append(thread.submit(prepare))
            mark(f"computing samples {one.batch.samples[0]}..{one.batch.samples[-1]}")
            yield one

    thread = ThreadPoolExecutor(1, "micro-batches", begin)
    try:
        pending = deque(thread.submit(prepare) for _ in range(ahead))
        yield ready()
    finally:
        thread.shutdown(cancel_futures=True)
