"""Process groups: who this rank is, how it reaches the others, and what ranks tell each other beside the tensors.

    1. `join()`              the store at which all ranks have met
    2. `initialize(...)`     process group, tensor/pipeline/data parallel groups  ->  `Topology`
    3. `with peers():`       this rank's work; ends at once where another rank is lost, and shuts down
    4. `Control(...)`        small messages over a gloo group of their own
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_encdec.platform.device import device, device_type
from megatron_encdec.platform.errors import AgreedError, RunFailed, UserError

T = TypeVar("T")
RENDEZVOUS_SECONDS = 600.0  # until a rank that does not come is an error
_LOST = re.compile(  # what gloo and NCCL say of a rank that is gone
    r"([Cc]onnection (closed|reset|refused|was)|Broken pipe|[Tt]imed out|remote process|Socket )[^\n.]*")
_store: dist.Store | None = None  # of this launch, from `join` to `shutdown`


@dataclass(frozen=True)
class RankEnvironment:
    """Rank, world size and local rank as the launcher tells them."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def read(cls) -> "RankEnvironment":
        """From RANK/WORLD_SIZE (torchrun, `--nproc`), else SLURM_PROCID/SLURM_NTASKS (a task a rank), else alone."""
        for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
            rank, size, local = (os.environ.get(name) for name in names)
            if rank is not None and size is not None and (names[0] == "RANK" or int(size) > 1):
                return cls(int(rank), int(size), int(local or 0))
        return cls(0, 1, 0)


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel groups and this rank's place in each."""

    world_size: int
    rank: int
    tensor: int
    pipeline: int
    data: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the head and sees the loss."""
        return self.pipeline_rank == self.pipeline - 1

    def as_dict(self) -> dict:
        """What determines the arithmetic: recorded with each checkpoint."""
        return {"world_size": self.world_size, "tensor": self.tensor, "pipeline": self.pipeline,
                "data": self.data, "device": device_type(), "threads": torch.get_num_threads()}


def check_parallel_sizes(world_size: int, tensor: int, pipeline: int) -> int:
    """The data-parallel size, or a `UserError` where tensor x pipeline does not divide the ranks."""
    if world_size % (tensor * pipeline):
        raise UserError(f"parallel.tensor={tensor} x parallel.pipeline={pipeline} = {tensor * pipeline} does not "
                        f"divide the {world_size} ranks of this launch")
    return world_size // (tensor * pipeline)


def join() -> dist.Store:
    """Meet the other ranks; the store in which they can leave each other messages before any group is there."""
    global _store
    environment = RankEnvironment.read()
    if _store is None and environment.world_size == 1:
        _store = dist.HashStore()
    elif _store is None:
        os.environ.setdefault("MASTER_PORT", "29500")
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("RANK", str(environment.rank))  # for the one line of an error
        _store, *_ = next(dist.rendezvous("env://", environment.rank, environment.world_size,
                                          timeout=timedelta(seconds=RENDEZVOUS_SECONDS)))
    return _store


def initialize(tensor: int = 1, pipeline: int = 1, timeout: float = 1800.0) -> Topology:
    """Join the process group (NCCL on GPU, gloo on CPU) and form Megatron's groups. timeout: seconds until a collective
    of training that does not finish is an error; longer than the watchdog's, which can name the rank that is missing.
    """
    from megatron_encdec.platform import megatron as mcore

    environment = RankEnvironment.read()
    data = check_parallel_sizes(environment.world_size, tensor, pipeline)
    if device_type() == "cuda":
        if tensor > 1:  # one hardware queue: a slice's exchange starts before the product that is to hide it
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
        torch.cuda.set_device(device())
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device_type() == "cuda" else "gloo", store=join(), rank=environment.rank,
            world_size=environment.world_size, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))
    state = mcore.parallel_state
    state.initialize_model_parallel(tensor, pipeline, distributed_timeout_minutes=max(1, int(timeout / 60)))
    mcore.tensor_parallel.model_parallel_cuda_manual_seed(0)  # no dropout: nothing random is drawn in a step
    return Topology(environment.world_size, environment.rank, tensor, pipeline, data,
                    state.get_tensor_model_parallel_rank(), state.get_pipeline_model_parallel_rank(),
                    state.get_data_parallel_rank())


@contextlib.contextmanager
def peers():
    """In a job of several ranks: whatever goes wrong ends this process at once, since the others will not answer
    any more and threads that wait for them would keep it; an agreed end (`UserError`, `RunFailed`) goes on up."""
    try:
        yield
    except (UserError, RunFailed):
        shutdown()
        raise
    except BaseException as error:
        environment = RankEnvironment.read()
        if environment.world_size == 1:
            raise
        lost = isinstance(error, RuntimeError) and _LOST.search(str(error))
        if lost:
            print(f"megatron-encdec: rank {environment.rank}: lost contact with another rank ({lost.group()}); the "
                  "same command continues from the newest checkpoint", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(f"megatron-encdec: rank {environment.rank}: interrupted", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    shutdown()


def shutdown() -> None:
    """Leave the groups; safe to call twice."""
    from megatron_encdec.platform import megatron as mcore

    global _store
    _store = None
    mcore.parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class Control:
    """Made collectively; every method is called by all ranks in the same order. timeout: seconds until a rank that does
    not answer is an error (the watchdog should speak first)."""

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
