"""The files of a checkpoint: torch's distributed format, as megatron.core writes it, each file hashed on its way out.

    __0_0.distcp, __1_0.distcp ...   one a rank: its boxes, each as `torch.save` writes a tensor
    .metadata                        which box of which tensor lies where (torch's Metadata, a pickle)
    common.pt, metadata.json         update count and optimizer settings; what format this is

    1. `write_boxes(...)`     one rank's file  ->  `Written`
    2. `write_index(...)`     rank 0: the three files about the others
    3. `read_boxes(...)`      fill boxes, whatever boxes were written; nothing in the files is run

Why not megatron.core's own save: it gathers the optimizer's state before it writes, and takes 23.3 s where this takes
4.2 s (docs/performance.md). Why not torch's: its files are not hashed on their way out, and its reader of `.metadata`
runs what is in it (docs/checkpoints.md).
"""

import hashlib
import io
import json
import math
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_encdec.engine.boxes import SHARDING, Box
from megatron_encdec.engine.integrity import gone
from megatron_encdec.engine.optimizer import update_count
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.platform.restricted_pickle import load_plain, load_records

_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
             "common_backend": "torch", "common_backend_version": 1}  # megatron.core's names for this format
_COMMON = MetadataIndex("common_state/shard_0_1")  # what it calls the state that is no tensor, from 0.19 on


@dataclass(frozen=True)
class Written:
    """A finished, durable file; each box in it (values on torch's `meta` device, which holds none) and its place."""

    name: str
    bytes: int
    sha256: str
    boxes: tuple[tuple[Box, _StorageInfo], ...] = ()


class HashedFile(io.FileIO):
    """A new file that hashes what is written to it; `finish()` makes it durable."""

    def __init__(self, path: Path):
        super().__init__(path, "xb")
        self._digest, self._error, self.bytes = hashlib.sha256(), None, 0

    def write(self, data) -> int:
        """Append `data`. An error of the disk is kept for `check`: torch.save's C++ must not see an exception."""
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._digest.update(view)
                done = 0
                while done < len(view):  # one write() moves at most 2 GiB
                    done += super().write(view[done:])
            except OSError as error:
                self._error = error
        self.bytes += len(view)
        return len(view)

    def check(self) -> None:
        """Raise the OSError that a `write` met."""
        if self._error is not None:
            raise self._error

    def finish(self, boxes: Iterable[tuple[Box, _StorageInfo]] = ()) -> Written:
        """On disk for good."""
        self.check()
        os.fsync(self.fileno())
        return Written(Path(self.name).name, self.bytes, self._digest.hexdigest(), tuple(boxes))


def write_bytes(path: Path, data: bytes) -> Written:
    """A small file, durable."""
    with HashedFile(path) as file:
        file.write(data)
        return file.finish()


def write_boxes(directory: Path, rank: int, boxes: Iterable[Box]) -> Written:
    """This rank's file."""
    name, written = f"__{rank}_0.distcp", []
    with HashedFile(directory / name) as file:
        for box in boxes:
            begin = file.bytes
            torch.save(box.values.cpu().clone(), file)  # a clone: a view would be saved with all it is a view of
            file.check()
            written.append((replace(box, values=box.values.to("meta")), _StorageInfo(name, begin, file.bytes - begin)))
        return file.finish(written)


def write_index(directory: Path, files: list[Written], common: dict) -> list[Written]:
    """The files that tell where everything is; `files` are all ranks'."""
    saved = io.BytesIO()
    torch.save(common, saved)
    return [write_bytes(directory / ".metadata", pickle.dumps(_index(files))),
            write_bytes(directory / "common.pt", saved.getvalue()),
            write_bytes(directory / "metadata.json", json.dumps(_BACKENDS).encode())]


def common_state(optimizer) -> dict:
    """common.pt as megatron.core lays it out: each parameter group's settings with Adam's update count."""
    count, groups = update_count(optimizer), optimizer.param_groups if optimizer else []
    settings = [{key: value for key, value in group.items() if key != "params"} | {"step": count} for group in groups]
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


def stored_dtypes(directory: Path) -> dict[str, torch.dtype | None]:
    """The tensors in a checkpoint: name -> dtype."""
    path = directory / ".metadata"
    try:
        return {name: getattr(getattr(about, "properties", None), "dtype", None)
                for name, about in load_records(path).state_dict_metadata.items()}
    except (AttributeError, TypeError) as error:
        raise IntegrityError(f"{path}: {error}; this checkpoint is damaged or foreign") from None


def _index(files: list[Written]) -> dcp.Metadata:
    tensors, places = {}, {}
    for file in files:
        for box, place in file.boxes:
            about = tensors.setdefault(box.key, dcp.TensorStorageMetadata(
                TensorProperties(dtype=box.values.dtype), torch.Size(box.shape), []))
            about.chunks.append(dcp.ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)))
            places[MetadataIndex(box.key, box.offset)] = place
    for key, about in tensors.items():
        held = sum(chunk.sizes.numel() for chunk in about.chunks)
        if held != about.size.numel():
            raise RuntimeError(f"{key}: the ranks hold {held} of its {about.size.numel()} elements")
    return dcp.Metadata(state_dict_metadata=tensors, storage_data=places, version="1.0.0")


def read_boxes(directory: Path, boxes: list[Box]) -> None:
    """Fill `boxes` in place. Raises `IntegrityError` where the checkpoint does not hold all of them."""
    path = directory / ".metadata"
    metadata = load_records(path)
    wanted: dict[str, list[Box]] = {}
    for box in boxes:
        wanted.setdefault(box.key, []).append(box)
    try:
        items = [item for key, parts in wanted.items() for item in _read_items(key, parts, metadata)]
        for item in items:
            _beside(directory, metadata.storage_data[item.storage_index].relative_path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: {error}; this checkpoint is damaged, or of another model") from None
    reader = dcp.FileSystemReader(directory)  # its read_metadata, which unpickles anything, is not called
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    try:
        reader.read_data(dcp.LoadPlan(items), _Filling(boxes))
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


def _read_items(key: str, boxes: list[Box], metadata: dcp.Metadata) -> list:
    about = metadata.state_dict_metadata.get(key)
    if not isinstance(about, dcp.TensorStorageMetadata):
        raise ValueError(f"{key} is not in it")
    if tuple(about.size) != boxes[0].shape:
        raise ValueError(f"{key} has the shape {tuple(about.size)} in it, not {boxes[0].shape}")
    chunks = [dcp.ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in boxes]
    items = create_read_items_for_chunk_list(key, about, chunks)
    if sum(math.prod(item.lengths) for item in items) != sum(chunk.sizes.numel() for chunk in chunks):
        raise ValueError(f"{key} is not whole in it")
    return items


class _Filling(dcp.DefaultLoadPlanner):
    """torch's planner, which finds where to put what is read among our boxes."""

    def __init__(self, boxes: list[Box]):
        super().__init__()
        self._values = {(box.key, torch.Size(box.offset)): box.values for box in boxes}

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._values[index.fqn, index.offset]
