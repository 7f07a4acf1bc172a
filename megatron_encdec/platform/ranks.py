"""Which one of how many processes this is, as our launcher, torchrun or srun tell it.

Slurm's variables count inside a step of srun only: a batch script sees SLURM_NTASKS and SLURM_PROCID too, and is one
process.

    1. `RankEnvironment.read()`     rank, world size and local rank
    2. `Step.read()`                the step that this process is a task of
    3. `seconds_of(variable, ...)`  a time that somebody may set for all that waits
"""

import contextlib
import itertools
import math
import os
import re
import socket
from dataclasses import dataclass

from megatron_encdec.platform.errors import UserError


@dataclass(frozen=True)
class RankEnvironment:
    """Rank, world size and local rank as what launched it tells them."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def read(cls) -> "RankEnvironment":
        """From RANK/WORLD_SIZE (torchrun, our launcher), else of a task of srun's step (a task a rank), else alone."""
        rank, size, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if rank is not None and size is not None:
            return cls(int(rank), int(size), int(local or 0))
        step = Step.read()
        return cls(step.task, step.tasks, step.local) if step else cls(0, 1, 0)

    def publish(self) -> None:
        """Set RANK, WORLD_SIZE and LOCAL_RANK of one of several, as srun does not."""
        if self.world_size > 1:
            os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=str(self.local_rank))


def seconds_of(variable: str, default: float, least: float) -> float:
    """What the environment variable says, `default` where it is not set; `UserError` where that is no time."""
    text = os.environ.get(variable) or str(default)
    with contextlib.suppress(ValueError):
        if least <= float(text) < math.inf:
            return float(text)
    raise UserError(f"{variable}: {text!r} is not a number of seconds of at least {least:g}; leave it out for "
                    f"{default:g}")


def host_name() -> str:
    """Of this host, in full; under Slurm the node's name there."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Step:
    """name: of job, step and requeue. task: of `tasks`, on node number `node`. local: the task's number on its node.
    tasks_of_node: how many tasks each node has. hosts: names of the nodes, in Slurm's order."""

    name: str
    task: int
    tasks: int
    node: int
    local: int
    tasks_of_node: tuple[int, ...]
    hosts: tuple[str, ...]

    @classmethod
    def read(cls) -> "Step | None":
        """The step; None outside of one."""
        get = os.environ.get
        if get("SLURM_PROCID") is None or not (get("SLURM_STEP_ID") or get("SLURM_STEP_NODELIST")):
            return None
        tasks = int(get("SLURM_STEP_NUM_TASKS") or get("SLURM_NTASKS") or 1)
        return cls(f"{get('SLURM_JOB_ID')}.{get('SLURM_STEP_ID')}.{get('SLURM_RESTART_COUNT', '0')}",
                   int(os.environ["SLURM_PROCID"]), tasks, int(get("SLURM_NODEID") or 0),
                   int(get("SLURM_LOCALID") or 0), _counts(get("SLURM_STEP_TASKS_PER_NODE") or str(tasks)),
                   hosts_of(get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST") or ""))


def _counts(text: str) -> tuple[int, ...]:
    """`2(x3),1` -> 2, 2, 2, 1."""
    return tuple(int(number) for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
                 for _ in range(int(times or 1)))


def hosts_of(nodelist: str) -> tuple[str, ...]:
    """`a[1-2,07]b,c` -> a1b, a2b, a07b, c: what `scontrol show hostnames` prints, which a container may not have."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^]]*\])+", nodelist):
        pieces = re.split(r"\[([^]]*)\]", part)  # text and ranges by turns
        choices = [_numbers(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
        names += map("".join, itertools.product(*choices))
    return tuple(names)


def _numbers(ranges: str) -> list[str]:
    spans = [span.partition("-") for span in ranges.split(",")]
    return [str(number).zfill(len(first)) for first, _, last in spans
            for number in range(int(first), int(last or first) + 1)]
