"""Which part of which global tensor this rank holds: what it writes to a checkpoint, and what it fills from one.

    1. `pieces(trunk)`       megatron.core's sharded state: each local tensor as boxes of global tensors
    2. `owned(...)`          the boxes this rank writes: together the ranks write every element once
    3. `wanted(...)`         the boxes this rank needs: its weights, and its part of the optimizer's state

DistributedOptimizer splits each parameter's fp32 state over the data-parallel ranks at any element: a flat range
[start, stop) of the parameter. `boxes` cuts such a range into at most 2 * dimensions - 1 rectangular boxes, which
torch's format can store, so nothing is gathered to save, and every rank writes an equal share of everything.
The names are megatron.core's `fully_reshardable` ones: any topology loads them, with or without this module.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_encdec.engine.fp8_state import fp8_state
from megatron_encdec.engine.optimizer import LocalState, local_states
from megatron_encdec.platform import megatron as mcore

STATE_PREFIX = "optimizer.state"
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}  # what sharded_state_dict is asked for


@dataclass(frozen=True)
class Shard:
    """The box of the global tensor `key` (of `shape`) that starts at `offset` and holds `values`."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: torch.Tensor  # contiguous, as many dimensions as `shape`

    @property
    def size(self) -> tuple[int, ...]:
        """Extent of the box."""
        return tuple(self.values.shape)


@dataclass(frozen=True)
class Piece:
    """One box of a global tensor inside a local parameter: elements `start` .. of the flattened parameter."""

    parameter: torch.Tensor
    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    replica: tuple[int, ...]  # (pipeline, tensor, data): all zero where no other rank holds the same first

    def cut(self, key: str, flat: torch.Tensor, first: int) -> Iterator[Shard]:
        """The part of this box that `flat` holds, `flat` being elements `first` .. of the flattened parameter."""
        begin = max(self.start, first)
        end = min(self.start + math.prod(self.size), first + flat.numel())
        for offset, size, position in boxes(self.size, begin - self.start, end - self.start):
            here = self.start + position - first
            values = flat[here : here + math.prod(size)].view(size)
            yield Shard(key, self.shape, tuple(map(sum, zip(self.offset, offset, strict=True))), values)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple, tuple, int]]:
    """Rectangles (offset, size, flat position) that tile elements `start` .. `stop - 1` of a row-major `shape`."""
    if stop <= start:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows that lie inside as a whole
    if first > last:  # inside one row
        yield from _in_row(shape, last, start, stop, row)
        return
    yield from _in_row(shape, first - 1, start, first * row, row)
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row
    yield from _in_row(shape, last, last * row, stop, row)


def _in_row(shape, number: int, start: int, stop: int, row: int):
    for offset, size, position in boxes(shape[1:], start - number * row, stop - number * row):
        yield (number, *offset), (1, *size), number * row + position


def pieces(trunk) -> list[Piece]:
    """The boxes of every tensor of `trunk`, under its names in a checkpoint; what is no tensor is left out.

    What is no tensor is `_extra_state`, pickles of FP8 kernels: what is in them is kept as tensors (fp8_state.py).
    """
    found = []
    for entry in mcore.nested_values(trunk.sharded_state_dict(metadata=SHARDING)):
        if isinstance(entry, mcore.ShardedTensorFactory):  # SwiGLU's first layer: two global boxes in one tensor
            found += [_piece(part, entry.data) for part in entry.build()]
        elif isinstance(entry, mcore.ShardedTensor):
            found.append(_piece(entry, entry.data))
    return found


def _piece(part, parameter: torch.Tensor) -> Piece:
    if not (part.data.is_contiguous() and parameter.is_contiguous()):
        raise RuntimeError(f"{part.key}: not contiguous in memory, so it has no flat ranges")
    start = part.data.storage_offset() - parameter.storage_offset()
    size = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return Piece(parameter, part.key, tuple(part.global_shape), tuple(part.global_offset), size, start,
                 tuple(part.replica_id))


def owned(trunk, optimizer) -> list[Shard]:
    """What this rank writes. Data-parallel ranks split a parameter's weights as they split its state."""
    states = local_states(optimizer)
    shards = []
    for piece in pieces(trunk):
        if any(piece.replica[:-1]):
            continue  # a norm weight on another tensor rank, tied embeddings on the last stage
        flat = piece.parameter.detach().view(-1)
        if piece.parameter not in states:
            if not piece.replica[-1]:
                shards += piece.cut(piece.key, flat, 0)
        elif (state := states[piece.parameter]) is not None:
            shards += piece.cut(piece.key, flat[state.start : state.stop], state.start)
            shards += _state_shards(piece, state)
    groups = mcore.parallel_state  # FP8's numbers are the same on all tensor and data ranks: the first ones write
    if optimizer is None or groups.get_tensor_model_parallel_rank() or groups.get_data_parallel_rank():
        return shards
    return shards + _fp8_shards(trunk)


def wanted(trunk, optimizer) -> list[Shard]:
    """What this rank fills: all of its weights and, with an optimizer, its range of the state, in place."""
    states = local_states(optimizer)
    shards = []
    for piece in pieces(trunk):
        shards += piece.cut(piece.key, piece.parameter.detach().view(-1), 0)
        if (state := states.get(piece.parameter)) is not None:
            shards += _state_shards(piece, state)
    return shards + (_fp8_shards(trunk) if optimizer is not None else [])


def _fp8_shards(trunk) -> list[Shard]:
    return [Shard(name, tuple(value.shape), (0,) * value.dim(), value.detach())
            for name, value in fp8_state(trunk).items()]


def _state_shards(piece: Piece, state: LocalState) -> Iterator[Shard]:
    for name, flat in state.tensors.items():
        yield from piece.cut(f"{STATE_PREFIX}.{name}.{piece.key}", flat.detach(), state.start)


class HostCopy:
    """Memory on the host that snapshots of a state are taken into: allocated (pinned for a GPU) and touched once.

    `shards`: the state; later ones have the same boxes. What lies at the same address is copied once: an fp32 run's
    weights and masters.
    """

    def __init__(self, shards: list[Shard]):
        _, end = _places(shards)
        self._on_gpu = any(shard.values.is_cuda for shard in shards)
        self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=self._on_gpu).fill_(0)

    def take(self, shards: list[Shard]) -> list[Shard]:
        """Copies of `shards`; valid until the next call."""
        places, end = _places(shards)
        if end > self._memory.numel():
            raise RuntimeError(f"the state grew from {self._memory.numel()} to {end} bytes")
        copies, copied = [], set()
        for shard in shards:
            place = _place(shard)
            begin = places[place]
            memory = self._memory[begin : begin + shard.values.nbytes]
            copy = memory.view(shard.values.dtype).view(shard.values.shape)
            if place not in copied:
                copied.add(place)
                copy.copy_(shard.values, non_blocking=True)
            copies.append(replace(shard, values=copy))
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def _place(shard: Shard) -> tuple:
    return shard.values.data_ptr(), shard.values.nbytes, shard.values.dtype


def _places(shards: list[Shard]) -> tuple[dict[tuple, int], int]:
    """Where in the host memory each piece of memory goes, and how much that is; every piece 64-byte aligned."""
    places, end = {}, 0
    for shard in shards:
        place = _place(shard)
        if place not in places:
            places[place] = end
            end += -(-shard.values.nbytes // 64) * 64
    return places, end
