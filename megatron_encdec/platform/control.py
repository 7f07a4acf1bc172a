"""What ranks tell each other beside the tensors: small messages over a gloo group of their own."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_encdec.platform.errors import AgreedError, UserError

T = TypeVar("T")


class Control:
    """Made collectively; every method is called by all ranks in the same order.

    timeout: seconds until a rank that does not answer is an error (the watchdog should speak first).
    """

    def __init__(self, timeout: float):
        self._alone = dist.get_world_size() == 1
        self._group = None if self._alone else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def highest(self, value: int) -> int:
        """The largest `value` of all ranks: how they agree, after every step, whether to stop."""
        if self._alone:
            return value
        box_1 = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box_1, dist.ReduceOp.MAX, group=self._group)
        return int(box_1)

    def from_first(self, work: Callable[[], T]) -> T:
        """Rank 0's result of `work()`, for everyone; a `UserError` there is the same `AgreedError` everywhere."""
        box = [None, None]
        if dist.get_rank() == 0:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = str(error)
        if not self._alone:
            dist.broadcast_object_list(box, src=0, group=self._group)
        result, refusal = box
        if refusal is not None:
            raise AgreedError(refusal)
        return result

    def gathered(self, value: T) -> list[T]:
        """Everyone's `value`, in order of rank."""
        if self._alone:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values
