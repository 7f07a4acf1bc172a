"""Reading pickles from a checkpoint without running anything from them.

A pickle may name any importable function and have it called. torch reads a checkpoint's `.metadata` with a bare
`pickle.load`; everything here that opens a checkpoint goes through this module instead. Checksums are no defence:
whoever alters a file can write its checksum too.
"""

import contextlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_encdec.platform.errors import IntegrityError

# Records without behaviour: building one runs no code but its own assignment of fields.
_RECORDS = {
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8",
              "int16", "int32", "int64", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
}


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no record of a checkpoint")
        return super().find_class(module, name)


def load_records(path: Path) -> Any:
    """The `Metadata` in torch's `.metadata`, of torch's own record classes alone, else `IntegrityError`."""
    with _refusing(path), open(path, "rb") as file:
        return _RecordUnpickler(file).load()


def load_plain(path: Path, begin: int = 0, length: int | None = None) -> Any:
    """What `torch.save` wrote to `path`, or to a part of it: tensors and plain containers, else `IntegrityError`."""
    with _refusing(path), open(path, "rb") as file:
        file.seek(begin)
        return torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _refusing(path: Path):
    """Turns whatever reading a strange file raises, which is nearly anything, into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; this checkpoint is not whole") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IntegrityError(f"{path}: refused: {reason}; this checkpoint is damaged or foreign") from None
