"""Which boxes of which global tensors this rank holds: what it writes to a checkpoint, and what it fills from one.

    1. `pieces(trunk)`    megatron.core's sharded state: where each local tensor lies in global tensors
    2. `owned(...)`       the boxes that this rank writes: together the ranks write every element once
    3. `wanted(...)`      the boxes that this rank needs: its weights, and its part of the optimizer's state
    4. `fp8_state(...)`   the scales of the delayed FP8 recipe, which are tensors of their own
    5. `HostCopy`         a snapshot of boxes in host memory

DistributedOptimizer splits each parameter's fp32 state over the data-parallel ranks at any element: a flat range
[start, stop) of the parameter. `tiles` cuts such a range into at most 2 * dimensions - 1 boxes, which torch's format
can store, so nothing is gathered to save, and every rank writes an equal share of everything.
The names are megatron.core's `fully_reshardable` ones: any topology loads them, with or without this module.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_encdec.engine.optimizer import LocalState, local_states
from megatron_encdec.platform import megatron as mcore

STATE_PREFIX = "optimizer.state"
FP8_PREFIX = "fp8"
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}  # what sharded_state_dict is asked for


@dataclass(frozen=True)
class Box:
    """A rectangle of the global tensor `key` (of `shape`): the one that starts at `offset` and holds `values`."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: torch.Tensor  # contiguous, as many dimensions as `shape`

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class Piece:
    """The rectangle of a global tensor that a local parameter holds, from element `start` of it, flattened, on."""

    parameter: torch.Tensor
    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    replica: tuple[int, ...]  # (pipeline, tensor, data): all zero where no other rank holds the same first

    def cut(self, key: str, flat: torch.Tensor, first: int) -> Iterator[Box]:
        """The boxes of this piece that `flat` holds, `flat` being elements `first` .. of the flattened parameter."""
        begin = max(self.start, first)
        end = min(self.start + math.prod(self.size), first + flat.numel())
        for offset, size, position in tiles(self.size, begin - self.start, end - self.start):
            here = self.start + position - first
            values = flat[here : here + math.prod(size)].view(size)
            yield Box(key, self.shape, tuple(map(sum, zip(self.offset, offset, strict=True))), values)


def tiles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple, tuple, int]]:
    """Rectangles (offset, size, flat position) that tile elements `start` .. `stop - 1` of a row-major `shape`."""
    if stop <= start:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,), start
        return
    row = math.prod(shape[1:])

    def in_row(number: int, start: int, stop: int):
        for offset, size, position in tiles(shape[1:], start - number * row, stop - number * row):
            yield (number, *offset), (1, *size), number * row + position

    first, last = -(-start // row), stop // row  # rows that lie inside as a whole
    if first > last:  # inside one row
        yield from in_row(last, start, stop)
        return
    yield from in_row(first - 1, start, first * row)
    if last > first:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    yield from in_row(last, last * row, stop)


def pieces(trunk) -> list[Piece]:
    """Where every tensor of `trunk` lies, under its names in a checkpoint.
    Left out is what is no tensor: `_extra_state`, pickles of FP8 kernels (`fp8_state` has what is in them)."""
    found = []
    for entry in mcore.nested_values(trunk.sharded_state_dict(metadata=SHARDING)):
        if isinstance(entry, mcore.ShardedTensorFactory):  # SwiGLU's first layer: two global tensors in a local one
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


def owned(trunk, optimizer) -> list[Box]:
    """What this rank writes. Data-parallel ranks split a parameter's weights as they split its state."""
    states = local_states(optimizer)
    boxes = []
    for piece in pieces(trunk):
        if any(piece.replica[:-1]):
            continue  # a norm weight on another tensor rank, tied embeddings on the last stage
        flat = piece.parameter.detach().view(-1)
        if piece.parameter not in states:
            if not piece.replica[-1]:
                boxes += piece.cut(piece.key, flat, 0)
        elif (state := states[piece.parameter]) is not None:
            boxes += piece.cut(piece.key, flat[state.start : state.stop], state.start)
            boxes += _state_boxes(piece, state)
    groups = mcore.parallel_state  # FP8's numbers are the same on all tensor and data ranks: the first ones write
    writes_fp8 = not groups.get_tensor_model_parallel_rank() and not groups.get_data_parallel_rank()
    return boxes + (_fp8_boxes(trunk) if optimizer is not None and writes_fp8 else [])


def wanted(trunk, optimizer) -> list[Box]:
    """What this rank fills: all of its weights and, with an optimizer, its range of the state, in place."""
    states = local_states(optimizer)
    boxes = []
    for piece in pieces(trunk):
        boxes += piece.cut(piece.key, piece.parameter.detach().view(-1), 0)
        if (state := states.get(piece.parameter)) is not None:
            boxes += _state_boxes(piece, state)
    return boxes + (_fp8_boxes(trunk) if optimizer is not None else [])


def _state_boxes(piece: Piece, state: LocalState) -> Iterator[Box]:
    for name, flat in state.tensors.items():
        yield from piece.cut(f"{STATE_PREFIX}.{name}.{piece.key}", flat.detach(), state.start)


def _fp8_boxes(trunk) -> list[Box]:
    return [Box(name, tuple(value.shape), (0,) * value.dim(), value.detach())
            for name, value in fp8_state(trunk).items()]


def make_fp8_state(trunk) -> None:
    """Give every FP8 layer its scales (1) and histories (0) before the first step, so that they can be saved and
    loaded from the start; nothing for the recipes without state, which look at each tensor anew."""
    if trunk.config.fp8 is None or trunk.config.fp8_recipe != "delayed":
        return
    recipe = mcore.fp8_recipe(trunk.config)
    for module in trunk.decoder.modules():
        if hasattr(module, "init_fp8_meta_tensors") and hasattr(module, "weight"):
            module.fp8_meta["num_gemms"] = 1  # linear layers: one product each
            module.fp8_meta["recipe"] = recipe
            module.init_fp8_meta_tensors(recipe)


def fp8_state(trunk) -> dict[str, torch.Tensor]:
    """Live tensors by their names in a checkpoint: fp8.LAYER.MODULE.scaling_fwd|scaling_bwd.scale|amax_history.
    Layers are numbered over the whole trunk, from 0. Transformer Engine saves `fp8_meta` as a pickle, which could run
    anything when it is read. Attention has one too, though its products stay in bf16: linear layers are those with a
    weight. Largest values are reduced over tensor- and data-parallel ranks: the same numbers on any topology."""
    found = {}
    for layer in getattr(getattr(trunk, "decoder", None), "layers", ()):
        for name, module in layer.named_modules():
            meta = (getattr(module, "fp8_meta", None) or {}) if hasattr(module, "weight") else {}
            for direction in ("scaling_fwd", "scaling_bwd"):
                for part in ("scale", "amax_history"):
                    value = getattr(meta.get(direction), part, None)
                    if isinstance(value, torch.Tensor):
                        found[f"{FP8_PREFIX}.{layer.layer_number - 1}.{name}.{direction}.{part}"] = value
    return found


class HostCopy:
    """Host memory for snapshots of `boxes` and later ones of the same sizes: allocated (pinned for a GPU) and touched
    once. What lies at the same address is copied once: an fp32 run's weights and masters."""

    def __init__(self, boxes: list[Box]):
        _, end = _places(boxes)
        self._on_gpu = any(box.values.is_cuda for box in boxes)
        self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=self._on_gpu).fill_(0)

    def take(self, boxes: list[Box]) -> list[Box]:
        """Copies of `boxes`; valid until the next call."""
        places, end = _places(boxes)
        if end > self._memory.numel():
            raise RuntimeError(f"the state grew from {self._memory.numel()} to {end} bytes")
        copies, copied = [], set()
        for box in boxes:
            place = _place(box)
            begin = places[place]
            copy = self._memory[begin : begin + box.values.nbytes].view(box.values.dtype).view(box.size)
            if place not in copied:
                copied.add(place)
                copy.copy_(box.values, non_blocking=True)
            copies.append(replace(box, values=copy))
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def _place(box: Box) -> tuple[int, int, torch.dtype]:
    return box.values.data_ptr(), box.values.nbytes, box.values.dtype


def _places(boxes: list[Box]) -> tuple[dict[tuple, int], int]:
    """Where in the host memory each piece of memory goes, and how much that is; every piece 64-byte aligned."""
    places, end = {}, 0
    for box in boxes:
        if (place := _place(box)) not in places:
            places[place] = end
            end += -(-box.values.nbytes // 64) * 64
    return places, end
