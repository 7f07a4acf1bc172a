"""Process groups: who this rank is, how it reaches the others, and what ranks tell each other beside the tensors.

    1. `join()`              the store at which all ranks have met
    2. `initialize(...)`     process group, tensor/pipeline/data parallel groups  ->  `Topology`
    3. `with peers():`       this rank's work; ends at once where another rank is lost, and shuts down
    4. `Control(...)`        small messages over a gloo group of their own
"""

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_encdec.platform.device import device, device_type
from megatron_encdec.platform.errors import AgreedError, NotMet, RunFailed, UserError, code_of, say
from megatron_encdec.platform.launcher import LOST_CONTACT, at_least_one, started
from megatron_encdec.platform.meeting import Party
from megatron_encdec.platform.ranks import RankEnvironment
from megatron_encdec.platform.signals import StopSignals

T = TypeVar("T")
CONNECT_SECONDS = 600.0  # for the connections between ranks that have met
_HEEDED_SECONDS = 5.0  # of these; then a signal ends the process at once
_LOST = re.compile(  # what gloo and NCCL say of a rank that is gone, to the end of the sentence
    r"([Cc]onnection (closed|reset|refused|was)|Broken pipe|[Tt]imed out|remote process|Socket )([^\n.]|\.(?=\S))*")
_ADDRESS = re.compile(r"\[(?:::ffff:)?([0-9a-fA-F.:]+)\]:\d+")
_hosts: dict[str, str] = {}  # address -> name, of the hosts of this job
_store: dist.Store | None = None  # of this launch, from `join` to `shutdown`


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
    """The data-parallel size, or a `UserError` where there are no ranks or tensor x pipeline does not divide them."""
    at_least_one("--nproc", world_size)
    if world_size % (tensor * pipeline):
        raise UserError(f"parallel.tensor={tensor} x parallel.pipeline={pipeline} = {tensor * pipeline} does not "
                        f"divide the {world_size} ranks of this launch")
    return world_size // (tensor * pipeline)


def join(name: str = "", signals: StopSignals | None = None) -> dist.Store:
    """Meet the other ranks; the store in which they can leave each other messages before any group is there.

    name: of the job, where it has none from its launcher. signals: those that end the wait for other ranks.
    """
    global _store
    environment = RankEnvironment.read()
    if _store is None and environment.world_size == 1:
        _store = dist.HashStore()
    elif _store is None:
        environment.publish()
        # It counts nobody: strangers could complete the count. Who knows its port has met the others.
        timeout, first = timedelta(seconds=CONNECT_SECONDS), environment.rank == 0
        server = dist.TCPStore("127.0.0.1", 0, None, True, timeout, False) if first else None
        met = Party.of_ranks(environment, name).meet({"store": server.port} if first else None, signals)
        met.close()
        _hosts.update(met.hosts)
        os.environ["MASTER_ADDR"] = met.address
        met.choose_interface()
        with _connecting(signals):
            _store = server or dist.TCPStore(met.address, met.offer["store"], None, False, timeout, False)
    return _store


@contextlib.contextmanager
def _connecting(signals: StopSignals | None):
    """While ranks that have met connect: a signal is heeded after the first step, or ends this process if that takes
    long; what fails is one line."""
    begun = time.monotonic()

    def leave(number: int) -> None:
        if time.monotonic() - begun > _HEEDED_SECONDS:
            print(f"stopped by {signal.Signals(number).name} while ranks connected; nothing was to be saved",
                  flush=True)
            os._exit(code_of(number))

    try:
        with signals.at_once(leave) if signals else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if not _hosts:  # there is one rank
            raise
        raise NotMet(f"rank {os.environ.get('RANK', 0)}: all ranks had met at {os.environ.get('MASTER_ADDR')}, but "
                     f"cannot connect over the interface {os.environ.get('GLOO_SOCKET_IFNAME')} (GLOO_SOCKET_IFNAME): "
                     f"{str(error).splitlines()[0]}") from None


def initialize(tensor: int = 1, pipeline: int = 1, timeout: float = 1800.0, name: str = "",
               signals: StopSignals | None = None) -> Topology:
    """Join the process group (NCCL on GPU, gloo on CPU) and form Megatron's groups. timeout: seconds until a collective
    of training that does not finish is an error; longer than the watchdog's, which can name the rank that is missing.
    name, signals: of `join`, where that has not been called.
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
        store = join(name, signals)
        with _connecting(signals):
            dist.init_process_group(
                "nccl" if device_type() == "cuda" else "gloo", store=store, rank=environment.rank,
                world_size=environment.world_size, timeout=timedelta(seconds=CONNECT_SECONDS))
    state = mcore.parallel_state
    state.initialize_model_parallel(tensor, pipeline, distributed_timeout_minutes=max(1, int(timeout / 60)))
    mcore.tensor_parallel.model_parallel_cuda_manual_seed(0)  # no dropout: nothing random is drawn in a step
    return Topology(environment.world_size, environment.rank, tensor, pipeline, data,
                    state.get_tensor_model_parallel_rank(), state.get_pipeline_model_parallel_rank(),
                    state.get_data_parallel_rank())


def _lost_contact(error: BaseException) -> str | None:
    """What is said of a rank that is gone, with its host; None where the error is another one."""
    lost = isinstance(error, RuntimeError) and _LOST.search(str(error))
    if not lost:
        return None
    where = sorted({_hosts.get(address, address) for address in _ADDRESS.findall(str(error))})
    return f"another rank{' on ' if where else ''}{', '.join(where)} ({lost.group()})"


@contextlib.contextmanager
def peers():
    """In a job of several ranks: whatever goes wrong ends this process at once, since the others will not answer
    any more and threads that wait for them would keep it; an agreed end (`UserError`, `RunFailed`) goes on up."""
    try:
        yield
    except (UserError, RunFailed) as error:
        if RankEnvironment.read().world_size > 1:
            say(error)
        shutdown()
        raise
    except BaseException as error:
        environment = RankEnvironment.read()
        if environment.world_size == 1:
            raise
        lost = _lost_contact(error)
        if lost:
            print(f"megatron-encdec: rank {environment.rank}: lost contact with {lost}; the same command continues "
                  "from the newest checkpoint", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(f"megatron-encdec: rank {environment.rank}: interrupted", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else LOST_CONTACT if lost and started() else 1)
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
