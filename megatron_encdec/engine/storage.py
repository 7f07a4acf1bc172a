"""The files of a checkpoint: torch's distributed format, as megatron.core writes it, each file hashed on its way out.

    __0_0.distcp, __1_0.distcp ...   one a rank: its boxes, each as `torch.save` writes a tensor
    .metadata                        which box of which tensor lies where (torch's Metadata, a pickle)
    common.pt, metadata.json         update count and optimizer settings; what format this is

    1. `write_shards(...)`           one rank's file  ->  `Written`
    2. `write_index(...)`            rank 0: the three files about the others
    3. `read_shards(...)`            fill boxes, whatever boxes were written; nothing in the files is run
"""

import hashlib
import io
import json
import math
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_encdec.engine.integrity import gone
from megatron_encdec.engine.shards import SHARDING, Shard
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.platform.restricted_pickle import load_plain, load_records

_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
             "common_backend": "torch", "common_backend_version": 1}  # megatron.core's names for this format
_COMMON = MetadataIndex("common_state/shard_0_1")  # what it calls the state that is no tensor, from 0.19 on


@dataclass(frozen=True)
class Box:
    """Where a box lies: tensor, global shape, offset, size, dtype; `length` bytes from `begin` in the rank's file."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    length: int


@dataclass(frozen=True)
class Written:
    """A finished, durable file: its name, what it measures and hashes to, and the boxes in it."""

    name: str
    bytes: int
    sha256: str
    boxes: tuple[Box, ...] = ()


class HashedFile:
    """A new file that hashes what is written to it; `finish()` makes it durable."""

    def __init__(self, path: Path):
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  (closed by __exit__)
        self._name, self._digest, self._error = path.name, hashlib.sha256(), None
        self.bytes = 0

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_exception):
        self._file.close()

    def write(self, data) -> int:
        """Append `data`. An error of the disk is kept for `check`: torch.save's C++ must not see an exception."""
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._digest.update(view)
                done = 0
                while done < len(view):  # one write() moves at most 2 GiB
                    done += self._file.write(view[done:])
            except OSError as error:
                self._error = error
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back; torch.save asks."""

    def check(self) -> None:
        """Raise the OSError that a `write` met."""
        if self._error is not None:
            raise self._error

    def finish(self, boxes: list[Box] = ()) -> Written:
        """On disk for good."""
        self.check()
        os.fsync(self._file.fileno())
        return Written(self._name, self.bytes, self._digest.hexdigest(), tuple(boxes))


def write_bytes(path: Path, data: bytes) -> Written:
    """A small file, durable."""
    with HashedFile(path) as file:
        file.write(data)
        return file.finish()


def write_shards(directory: Path, rank: int, shards: Iterable[Shard]) -> Written:
    """This rank's file."""
    boxes = []
    with HashedFile(directory / f"__{rank}_0.distcp") as file:
        for shard in shards:
            begin = file.bytes
            torch.save(shard.values.cpu().clone(), file)  # a clone: a view would be saved with all it is a view of
            file.check()
            boxes.append(Box(shard.key, shard.shape, shard.offset, shard.size, shard.values.dtype, begin,
                             file.bytes - begin))
        return file.finish(boxes)


def write_index(directory: Path, files: list[Written], common: dict) -> list[Written]:
    """The files that tell where everything is; `files` are all ranks'."""
    saved = io.BytesIO()
    torch.save(common, saved)
    return [write_bytes(directory / ".metadata", pickle.dumps(_index(files))),
            write_bytes(directory / "common.pt", saved.getvalue()),
            write_bytes(directory / "metadata.json", json.dumps(_BACKENDS).encode())]


def common_state(count: int, groups: list[dict]) -> dict:
    """common.pt as megatron.core lays it out: the parameter groups' settings and Adam's update count."""
    settings = [{**group, "step": count} for group in groups]
    return {"optimizer": {"optimizer": {"param_groups": settings},
                          "param_state_sharding_type": SHARDING["distrib_optim_sharding_type"]}}


def read_update_count(directory: Path) -> int:
    """Adam's update count: in common.pt, or among the tensors' bytes, where megatron.core 0.19 puts that state."""
    path = directory / "common.pt"
    try:
        if not path.exists() and (place := load_records(directory / ".metadata").storage_data.get(_COMMON)):
            path = _beside(directory, place.relative_path)
            (state,) = load_plain(path, place.offset, place.length)
        else:
            state = load_plain(path)
        return int(state["optimizer"]["optimizer"]["param_groups"][0].get("step", 0))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise IntegrityError(f"{path}: holds no optimizer settings; this checkpoint is damaged or foreign") from None


def stored_names(directory: Path) -> set[str]:
    """Names of the tensors in a checkpoint."""
    return set(stored_dtypes(directory))


def stored_dtypes(directory: Path) -> dict[str, torch.dtype | None]:
    """The tensors in a checkpoint: name -> dtype."""
    path = directory / ".metadata"
    try:
        return {name: getattr(getattr(about, "properties", None), "dtype", None)
                for name, about in load_records(path).state_dict_metadata.items()}
    except (AttributeError, TypeError) as error:
        raise IntegrityError(f"{path}: {error}; this checkpoint is damaged or foreign") from None


def _index(files: list[Written]) -> Metadata:
    tensors, places = {}, {}
    for file in files:
        for box in file.boxes:
            about = tensors.setdefault(box.key, TensorStorageMetadata(
                TensorProperties(dtype=box.dtype), torch.Size(box.shape), []))
            about.chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)))
            places[MetadataIndex(box.key, box.offset)] = _StorageInfo(file.name, box.begin, box.length)
    for key, about in tensors.items():
        held = sum(chunk.sizes.numel() for chunk in about.chunks)
        if held != about.size.numel():
            raise RuntimeError(f"{key}: the ranks hold {held} of its {about.size.numel()} elements")
    return Metadata(state_dict_metadata=tensors, storage_data=places, version="1.0.0")


def read_shards(directory: Path, shards: list[Shard]) -> None:
    """Fill the boxes `shards` in place. Raises `IntegrityError` where the checkpoint does not hold all of them."""
    path = directory / ".metadata"
    metadata = load_records(path)
    wanted: dict[str, list[Shard]] = {}
    for shard in shards:
        wanted.setdefault(shard.key, []).append(shard)
    items, targets = [], {}
    try:
        for key, boxes in wanted.items():
            chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in boxes]
            found = _read_items(key, metadata, boxes[0].shape, chunks)
            targets |= {(key, torch.Size(box.offset)): box.values for box in boxes}
            items += found
        for item in items:
            _beside(directory, metadata.storage_data[item.storage_index].relative_path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: {error}; this checkpoint is damaged, or of another model") from None
    reader = FileSystemReader(directory)  # its read_metadata, which unpickles anything, is not called
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    try:
        reader.read_data(LoadPlan(items), _Targets(targets))
    except FileNotFoundError as error:
        if not directory.exists():
            raise gone(directory) from None
        raise IntegrityError(f"{error.filename}: missing; this checkpoint is not whole") from None
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError, AssertionError) as error:
        raise IntegrityError(f"{directory}: a *.distcp file is damaged or foreign: "
                             f"{str(error).splitlines()[0]}") from None


def _beside(directory: Path, name: str) -> Path:
    """The data file `name` of a checkpoint. Raises ValueError where it is none of its own."""
    if Path(name).name != name or not name.endswith(".distcp"):
        raise ValueError(f"it points at {name!r}, which is not beside it")
    return directory / name


def _read_items(key: str, metadata: Metadata, shape: tuple, chunks: list[ChunkStorageMetadata]) -> list:
    """What to read for the boxes `chunks` of the tensor `key`."""
    about = metadata.state_dict_metadata.get(key)
    if not isinstance(about, TensorStorageMetadata):
        raise ValueError(f"{key} is not in it")
    if tuple(about.size) != shape:
        raise ValueError(f"{key} has the shape {tuple(about.size)} in it, not {shape}")
    items = create_read_items_for_chunk_list(key, about, chunks)
    if sum(math.prod(item.lengths) for item in items) != sum(chunk.sizes.numel() for chunk in chunks):
        raise ValueError(f"{key} is not whole in it")
    return items


class _Targets:
    """The part of torch's LoadPlanner that its reader calls while it reads tensors."""

    def __init__(self, targets: dict):
        self._targets = targets

    def resolve_tensor(self, item) -> torch.Tensor:
        """Where the item goes."""
        target = self._targets[item.dest_index.fqn, item.dest_index.offset]
        for dimension, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dimension, start, length)
        return target

    def commit_tensor(self, item, tensor: torch.Tensor) -> None:
        """The values were copied in place."""
