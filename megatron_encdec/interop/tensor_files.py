"""The tensors of a Hugging Face directory: found, checked by their headers, read a few rows at a time.

    1. `TensorFiles(directory)`       which file holds which tensor, with shape and dtype; nothing is read yet
    2. `read(name, start, stop)`      rows of a tensor
    3. `fingerprint(names)`           sha256 of whole files

The safetensors format is a length, a JSON header and the bytes: files are read with plain reads, so that memory is
what is asked for and no page of a mapped file counts. Whatever is wrong with the files (missing, truncated, not what
the index says, of a foreign kind) is an `IntegrityError` that names the file, before a byte of a tensor is read.
Pickled checkpoints are refused: reading one can run what its author wrote.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import sha256_file

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `begin` counts from the start of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """`places`: tensor name -> where it lies. `files`: in order of name."""

    def __init__(self, directory: Path):
        self.places: dict[str, Place] = {}
        index = _read_index(directory)
        names = sorted(set(index.values())) if index else [_SINGLE]
        if index is None and not (directory / _SINGLE).is_file():
            raise UserError(_what_is_there(directory))
        self.files = [directory / name for name in names]
        for file in self.files:
            for name, place in _read_header(file).items():
                if name in self.places:
                    raise IntegrityError(f"{file}: holds {name}, and so does {self.places[name].file.name}")
                self.places[name] = place
        for name, file in (index or {}).items():
            if name not in self.places or self.places[name].file.name != file:
                raise IntegrityError(f"{directory / file}: does not hold {name}, which {_INDEX} says is there")

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(place.bytes for place in self.places.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` .. `stop` - 1 of a tensor (default: all), in its own dtype, in memory of their own."""
        place = self.places[name]
        rows = place.shape[0] if place.shape else 1
        stop = rows if stop is None else stop
        row_bytes = place.bytes // max(rows, 1)
        memory = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        view, done = memoryview(memory.numpy()), 0
        with open(place.file, "rb", buffering=0) as file:
            file.seek(place.begin + start * row_bytes)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise IntegrityError(f"{place.file}: ended while {name} was read")
                done += count
        return memory.view(place.dtype).view((stop - start, *place.shape[1:]) if place.shape else ())

    def fingerprint(self, files: Iterable[Path]) -> dict[str, str]:
        """File name -> hex sha256 of its bytes."""
        return {file.name: sha256_file(file) for file in files}


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file name, None where there is no index."""
    path = directory / _INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        for name in index.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it points at {name!r}, which is no safetensors file beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: not an index of safetensors files ({error})") from None
    missing = sorted({name for name in index.values() if not (directory / name).is_file()})
    if missing:
        raise IntegrityError(f"{directory / missing[0]}: missing; {_INDEX} names {len(set(index.values()))} files and "
                             f"{len(missing)} of them {'is' if len(missing) == 1 else 'are'} not there")
    return index


def _read_header(file: Path) -> dict[str, Place]:
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise IntegrityError(f"{file}: {size:,} bytes are too few for its header: it is truncated, or no "
                                     "safetensors file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        places, end = {}, 0
        for name, entry in header.items():
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if dtype not in DTYPES:
                raise UserError(f"{file}: {name} is stored as {dtype}; only {', '.join(DTYPES)} can be imported: "
                                "save the model in one of these (a quantised one has to be dequantised first)")
            places[name] = Place(file, DTYPES[dtype], shape, 8 + length + first)
            if last - first != places[name].bytes:
                raise IntegrityError(f"{file}: {name} of shape {list(shape)} in {dtype} has {last - first} bytes")
            end = max(end, last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{file}: its header is damaged ({error})") from None
    if size != 8 + length + end:
        fault = "it is truncated" if size < 8 + length + end else "something was appended"
        raise IntegrityError(f"{file}: {size:,} bytes, its header speaks of {8 + length + end:,}: {fault}")
    return places


def _what_is_there(directory: Path) -> str:
    """Why there are no tensors to read, and what to do about it."""
    names = sorted(os.listdir(directory))
    parts = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if parts:
        return (f"{directory}: {parts[0]} is there, but neither {_SINGLE} nor {_INDEX}, which says what the parts "
                "hold; bring the index too")
    if any(name.startswith("adapter_") for name in names):
        return f"{directory}: holds an adapter, not a model; merge it into its base model first"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (f"{directory}: only pickled weights ({pickles[0]}), and reading a pickle can run code; where you "
                "trust them, convert them once: python -c 'from transformers import AutoModelForCausalLM as M; "
                f'M.from_pretrained("{directory}").save_pretrained("{directory}-safetensors")\'')
    if any(name.endswith(".gguf") for name in names):
        return (f"{directory}: a GGUF file is quantised; load it with transformers (gguf_file=...), which dequantises "
                "it, and save it as safetensors")
    return f"{directory}: no weights there ({_SINGLE} or {_INDEX})"
