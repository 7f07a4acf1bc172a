"""The files of a Hugging Face directory: found, checked, read, copied.

    1. `read_object(path)`                          a JSON object
    2. `check_files(directory, ignore)`             adapters, files that transformers reads in place of others, files
                                                    that cannot be read: refused by name, or a remark by `--ignore`
    3. `copy_tokenizer_files(source, directory)`    the tokenizer's files as they are
    4. `TensorFiles(directory)`                     which file holds which tensor, with shape and dtype, by the headers;
                                                    `read(name, start, stop)`: rows of a tensor, all of them finite

Where several files claim to be the weights, those are taken that transformers 5.18 takes: the file that config.json
names under `transformers_weights`, else model.safetensors, else what model.safetensors.index.json lists.

Whatever is wrong with the weights (missing, truncated, not what the index says, of a foreign kind) is an
`IntegrityError` that names the file, before a byte of a tensor is read. Pickled checkpoints are refused: reading one
can run what its author wrote.
"""

import json
import math
import re
import shlex
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.rundir.files import refuse_pointer
from megatron_encdec.text.tokenizer_models import MODEL_FILES

_OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_FILES = (*MODEL_FILES, *_OBJECTS[1:], "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_NUMBERED = re.compile(r"-\d+-of-\d+\.")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def _refuse_stand_in(path: Path) -> None:
    refuse_pointer(path)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to {path.readlink()}, which is not there; bring the file, or remove the link")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is no file. Raises `UserError` where it cannot be read."""
    _refuse_stand_in(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); it may be cut short: copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of keys")
    return content


def check_files(directory: Path, ignore: Collection[str] = ()) -> list[str]:
    """Remarks on what `ignore` leaves out. Raises `UserError` for an adapter, for a file that transformers passes over,
    and for one that cannot be read (a link to nothing, a pointer to what was never downloaded, no JSON)."""
    for name in _TOKENIZER_FILES:
        _refuse_stand_in(directory / name)
    contents = {name: read_object(directory / name) for name in _OBJECTS}
    files = contents["tokenizer_config.json"].get("fast_tokenizer_files")
    if files and "fast_tokenizer_files" not in ignore:
        from transformers.tokenization_utils_base import get_fast_tokenizer_file

        chosen = get_fast_tokenizer_file(files)
        if chosen != "tokenizer.json":
            raise UserError(f"{directory / 'tokenizer_config.json'}: fast_tokenizer_files: transformers reads {chosen} "
                            "in place of tokenizer.json; copy it to tokenizer.json and take the key out, or read "
                            "tokenizer.json with --ignore fast_tokenizer_files")
    adapter = sorted(file.name for file in directory.glob("adapter_*"))
    if adapter and "adapter" not in ignore:
        raise UserError(f"{directory}: holds an adapter ({', '.join(adapter)}) beside the base's weights, and "
                        "transformers with peft loads both; merge it into the base (merge_and_unload, "
                        "save_pretrained), or take the base alone with --ignore adapter")
    return [f"the base alone is taken; left out: {', '.join(adapter)}"] if adapter else []


def copy_tokenizer_files(source: Path, directory: Path) -> bool:
    """Copy the tokenizer's files as they are; whether there are any."""
    names = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, directory / name)
    return bool(names)


@dataclass(frozen=True)
class Place:
    """The file that holds a tensor, and what its header says of it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """`places`: tensor name -> where it lies. `files`: in order of name. `remarks`: what was passed over.

    named: the file to take, where config.json names one. Raises `UserError` where there are no weights that can be
    read, `IntegrityError` where the files are not what their headers or the index say.
    """

    def __init__(self, directory: Path, named: str | None = None):
        self.places: dict[str, Place] = {}
        chosen = _choose(directory, named)
        index = _read_index(chosen) if chosen.name.endswith(".json") else {}
        self.files = [directory / name for name in sorted(set(index.values()))] if index else [chosen]
        self.remarks = [f"{chosen.name} is read, as transformers does; {other} beside it is not" for other in
                        (_SINGLE, _INDEX) if other != chosen.name and (directory / other).is_file()]
        for file in self.files:
            for name, place in _read_header(file).items():
                if name in self.places:
                    raise IntegrityError(f"{file}: holds {name}, and so does {self.places[name].file.name}; copy the "
                                         "model again, without files of an earlier one")
                self.places[name] = place
        for name, file in index.items():
            if name not in self.places or self.places[name].file.name != file:
                raise IntegrityError(f"{directory / file}: does not hold {name}, which {chosen.name} says is there; "
                                     "they are of different models: copy index and files again")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` .. `stop` - 1 of a tensor (default: all), in its own dtype, in memory of their own.

        Raises `IntegrityError` where the file is not whole any more, or the tensor holds a value that is not finite.
        """
        file = self.places[name].file
        with _opened(file) as opened:
            values = opened.get_tensor(name) if stop is None else opened.get_slice(name)[start:stop]
            if torch.isfinite(values).all():
                return values.clone()  # the mapped pages, which count as memory, go with the mapping
            values = opened.get_tensor(name)  # the message is of the whole tensor
            nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
        overflow = "; float16 ends at 65504: save it as bfloat16 or float32" if values.dtype == torch.float16 else ""
        raise IntegrityError(f"{file}: {name} holds {nan:,} NaN and {infinite:,} infinite values among "
                             f"{values.numel():,}: nothing can be trained from it; take a checkpoint from before it "
                             f"diverged{overflow}")


def _choose(directory: Path, named: str | None) -> Path:
    """The weights, or the index of them, in transformers' order."""
    if named is None:
        for name in (_SINGLE, _INDEX):
            if (directory / name).is_file():
                return directory / name
        raise UserError(_what_is_there(directory))
    if Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{directory / 'config.json'}: transformers_weights={named!r}: not a safetensors file, or "
                        "the index of some, in this directory; take the key out to read model.safetensors")
    if not (directory / named).is_file():
        raise UserError(f"{directory / named}: missing; config.json names it (transformers_weights): bring it, or "
                        "take the key out to read model.safetensors")
    return directory / named


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    _refuse_stand_in(path)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        for name in index.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it points at {name!r}, which is no safetensors file beside it")
        if not index:
            raise ValueError("it lists no tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: not an index of safetensors files ({error})") from None
    if missing := sorted({name for name in index.values() if not (path.parent / name).is_file()}):
        raise IntegrityError(f"{path.parent / missing[0]}: missing; {path.name} names {len(set(index.values()))} files "
                             f"and {len(missing)} of them {'is' if len(missing) == 1 else 'are'} not there")
    return index


def _opened(file: Path):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file}: {file.stat().st_size:,} bytes, not a whole safetensors file ({error}): it is "
                             "truncated or damaged; copy it again") from None


def _read_header(file: Path) -> dict[str, Place]:
    _refuse_stand_in(file)
    places = {}
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            tensor = opened.get_slice(name)
            dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
            if dtype not in _DTYPES:
                raise UserError(f"{file}: {name} is stored as {dtype}; only {', '.join(_DTYPES)} can be imported: save "
                                "the model in one of these (a quantised one has to be dequantised first)")
            places[name] = Place(file, _DTYPES[dtype], shape)
    return places


def _what_is_there(directory: Path) -> str:
    """Why there are no tensors to read, and what to do about it."""
    for name in (_SINGLE, _INDEX):
        _refuse_stand_in(directory / name)
    names = sorted(entry.name for entry in directory.iterdir())
    parts = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if numbered := [name for name in parts if _NUMBERED.search(name)]:
        return (f"{directory}: {numbered[0]} is there, but neither {_SINGLE} nor {_INDEX}, which says what the parts "
                "hold; bring the index too")
    if parts:
        return (f"{directory}: {parts[0]} is there, but transformers reads {_SINGLE} or {_INDEX}; if it holds this "
                f"model under the names of transformers, rename it to {_SINGLE}")
    if any(name.startswith("adapter_") for name in names):
        return f"{directory}: holds an adapter, not a model; merge it into its base model first"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        code = (f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(directory)!r})"
                f".save_pretrained({str(directory) + '-safetensors'!r})")
        return (f"{directory}: only pickled weights ({pickles[0]}), and reading a pickle can run code; where you "
                f"trust them, convert them once: python -c {shlex.quote(code)}")
    if any(name.endswith(".gguf") for name in names):
        return (f"{directory}: a GGUF file is quantised; load it with transformers (gguf_file=...), which dequantises "
                "it, and save it as safetensors")
    below = sorted(path.parent for name in (_SINGLE, _INDEX) for path in directory.glob(f"*/{name}"))
    elsewhere = f"; there are some in {below[0]}" if below else ""
    return f"{directory}: no weights there ({_SINGLE} or {_INDEX}){elsewhere}"
