"""`doctor --nodes`: do the nodes of a job fit together. One process a node (or a GPU), started by srun or on each.

    1. `examine_nodes(folder)`     what each has and measures: versions, code, devices, clock, link, disk  ->  `Node`s
    2. `odd_ones(nodes, folder)`   a line for each that differs from most of them, or lies far off
    3. `table(nodes)`              what is equal everywhere, once; then a line a node
"""

import os
import platform as python_platform
import secrets
import shutil
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_encdec.platform import device
from megatron_encdec.platform.code import code_hash
from megatron_encdec.platform.distributed import Control, initialize, peers
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.ranks import RankEnvironment, host_name

_CLOCK_SECONDS = 1.0  # apart, and times in logs and on files mislead
_SLOW = 0.5  # of the median: a link that is slower is named
_LINK_BYTES = 64 << 20
_TRIES = 3  # of which the fastest counts
_LEAST_FREE = 10 << 30  # bytes: a checkpoint or two
_SEEN_SECONDS = 10.0  # for a new file to be seen by the others
_TIMEOUT = 120.0  # seconds for what all do together


@dataclass(frozen=True)
class Node:
    """What one process says. same: what has to be equal everywhere. clock: seconds after rank 0's. link: bytes a second
    from the rank before. free: bytes in the folder, None where there is no such folder. sees: rank 0's file in it."""

    rank: int
    host: str
    same: dict[str, str]
    interface: str
    clock: float
    link: float
    free: int | None
    sees: bool


def examine_nodes(folder: str, packages: list[str]) -> list[Node]:
    """All nodes, on every rank; collective. folder: where runs will be. packages: whose versions are compared."""
    environment = RankEnvironment.read()
    if environment.world_size == 1:
        raise UserError("doctor --nodes: this is one process alone; start it on all nodes (srun --ntasks-per-node 1 "
                        "megatron-encdec doctor --nodes), or say --nnodes, --node-rank and --master on each")
    environment.publish()
    initialize(timeout=_TIMEOUT, name="doctor")
    with peers():
        control = Control(_TIMEOUT)
        control.highest(0)  # so that all read their clocks together
        now = time.time()
        clock = now - control.gathered(now)[0]
        found = Node(environment.rank, host_name(), _same(packages), os.environ.get("GLOO_SOCKET_IFNAME", "?"), clock,
                     _link(environment.rank, environment.world_size), *_disk(folder, control))
        return control.gathered(found)


def _same(packages: list[str]) -> dict[str, str]:
    found = {"python": python_platform.python_version(), "code": code_hash()[:12]}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    found["torch"] = torch.__version__
    if device.device_type() == "cuda":
        cards = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        found |= {"devices": ", ".join(f"{count} x {name}" for name, count in cards.items()),
                  "cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    else:
        found["devices"] = "cpu"
    return found


def _link(rank: int, ranks: int) -> float:
    """Bytes a second from the rank before this one; the pairs of a round share no rank."""
    block = torch.zeros(_LINK_BYTES // 4, device=device.device())
    fastest = 0.0
    for attempt in range(_TRIES + 1):  # the first one connects
        size = block[:1024] if attempt == 0 else block
        for turn in range(3):
            starts = [first for first in range(ranks) if (2 if first == ranks - 1 else first % 2) == turn]
            begun = time.perf_counter()
            if rank in starts:
                dist.send(size, (rank + 1) % ranks)
            if (rank - 1) % ranks in starts:
                dist.recv(size, (rank - 1) % ranks)
                if block.is_cuda:
                    torch.cuda.synchronize()
                if attempt:
                    fastest = max(fastest, _LINK_BYTES / (time.perf_counter() - begun))
            dist.barrier()
    return fastest


def _disk(folder: str, control: Control) -> tuple[int | None, bool]:
    """(free bytes, whether a file that rank 0 writes is seen here)."""
    probe = Path(control.from_first(lambda: _write(folder)))
    limit = time.monotonic() + _SEEN_SECONDS
    while not (seen := probe.exists()) and time.monotonic() < limit:
        time.sleep(0.1)
    control.highest(0)
    probe.unlink(missing_ok=True)
    try:
        return shutil.disk_usage(folder).free, seen
    except OSError:
        return None, seen


def _write(folder: str) -> str:
    path = Path(folder).resolve() / f".doctor-{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # as a run does with its own
        path.touch()
    except OSError as error:
        raise UserError(f"doctor --nodes --directory {folder}: cannot be written to ({error.strerror})") from None
    return str(path)


def odd_ones(nodes: list[Node], folder: str) -> list[str]:
    """A line for each thing that does not fit; none where all do."""
    lines = []
    for key in {key: None for node in nodes for key in node.same}:
        (usual, _), *others = Counter(node.same.get(key, "missing") for node in nodes).most_common()
        for value, _ in others:
            odd = [node for node in nodes if node.same.get(key, "missing") == value]
            lines.append(f"{_who(odd)}: {key} is {value}, elsewhere {usual}")
    lines += [f"{_who([node])}: its clock is {node.clock:+.1f} s from that of rank 0" for node in nodes
              if abs(node.clock) > _CLOCK_SECONDS]
    unseen = [node for node in nodes if not node.sees]
    if unseen:
        lines.append(f"{_who(unseen)}: {folder} is not the folder that rank 0 writes to; runs need one that all share")
    for crosses in (False, True):  # links within a host, and between two
        links = [node for node in nodes if (node.host != nodes[node.rank - 1].host) == crosses]
        median = statistics.median([node.link for node in links]) if links else 0.0
        lines += [f"{_who([node])}: {_speed(node.link)} from rank {(node.rank - 1) % len(nodes)}, the median is "
                  f"{_speed(median)}" for node in links if node.link < _SLOW * median]
    full = [node for node in nodes if node.free is not None and node.free < _LEAST_FREE]
    return lines + [f"{_who([node])}: {folder} has {node.free / 2**30:.1f} GiB left" for node in full]


def _who(nodes: list[Node]) -> str:
    named = ", ".join(f"rank {node.rank} on {node.host}" for node in nodes[:4])
    return named + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def table(nodes: list[Node]) -> list[str]:
    """What is equal everywhere, once; then a line a node."""
    keys = list({key: None for node in nodes for key in node.same})
    differing = [key for key in keys if len({node.same.get(key) for node in nodes}) > 1]
    equal = ", ".join(f"{key} {nodes[0].same[key]}" for key in keys
                      if key not in differing and nodes[0].same[key] != "missing")
    rows = [("rank", "host", "clock", "interface", "link", "free", *differing)]
    rows += [(str(node.rank), node.host, f"{node.clock:+.3f} s", node.interface, _speed(node.link),
              "no such folder" if node.free is None else f"{node.free / 2**30:.1f} GiB",
              *(node.same.get(key, "missing") for key in differing)) for node in nodes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"equal on all {len(nodes)}: {equal}", "",
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)]
