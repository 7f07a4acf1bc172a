"""Hugging Face directories of one shape merged into one; all but the weights is the first's."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_encdec.engine.storage import HashedFile
from megatron_encdec.interop.export import RECORD
from megatron_encdec.interop.merging import Recipe, blocks, check_same, check_shapes, dtype_of
from megatron_encdec.interop.source_config import read_source
from megatron_encdec.interop.source_files import PICKLES, TensorFiles, read_object
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.directories import new_directory
from megatron_encdec.rundir.files import sha256_file, write_json_atomic
from megatron_encdec.text.tokenizer import AS_OPTION, load_tokenizer
from megatron_encdec.text.tokenizer_models import find_model_file

MERGE_RECORD = "merge.json"
_INDEX = "model.safetensors.index.json"
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # safetensors' names
# keys of a config.json that say which side of a switch of objective a model is on, or nothing of what it computes
_MAY_DIFFER = {"_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "is_causal",
               "mask_token_id", "max_position_embeddings", "model_type", "pad_token_id", "torch_dtype",
               "transformers_version", "use_cache"}


class DirectoryWeights:
    """The safetensors of a Hugging Face directory."""

    def __init__(self, directory: Path):
        self.files = TensorFiles(directory, read_object(directory / "config.json").get("transformers_weights"))
        self.shapes = {name: place.shape or (1,) for name, place in self.files.places.items()}
        self.dtypes = {name: place.dtype for name, place in self.files.places.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` .. `stop` - 1."""
        values = self.files.read(name, start, stop) if self.files.places[name].shape else self.files.read(name)
        return values.view(stop - start, *self.shapes[name][1:])

    def parts(self, _name: str) -> None:
        """Each tensor is one."""


def merge_directories(models: Sequence[str], out: Path, recipe: Recipe) -> list[str]:
    """The Hugging Face directory `out`, with all but the weights from the first; lines that say what it is."""
    directories = [Path(model) for model in models]
    for directory in directories:
        if apart := sorted(path.parent for path in directory.glob("*/*.safetensors")):
            raise UserError(f"{apart[0]}: weights beside the model's own, of a task's head perhaps, which a merge "
                            "would leave out; merge the encoders without them")
    expected = _of_directory(directories[0])
    for directory in directories[1:]:
        check_same(str(directory), models[0], _of_directory(directory), expected)
        _check_tensors(directory, directories[0])
    weights = [DirectoryWeights(directory) for directory in directories]
    check_shapes(weights, models)
    with new_directory(out, "merge") as work:
        _copy_all_but_weights(directories[0], work)
        _write_weights(weights, recipe, work)
        about = {"format": 1, **recipe.as_dict(), "models": [_origin(one) for one in directories]}
        write_json_atomic(work / MERGE_RECORD, about)
        (work / "README.md").write_text(_card(about), encoding="utf-8")
    return [f"{out}: {recipe.told(models)}, {sum(place.bytes for place in weights[0].files.places.values()):,} "
            f"bytes; config, tokenizer and all else are those of {models[0]}"]


def _of_directory(directory: Path) -> dict:
    """What has to be the same in all: the trunk where it is one of ours, else what config.json says."""
    try:
        model = read_source(directory).model.identity()
    except UserError:
        content = read_object(directory / "config.json")
        model = {key: value for key, value in content.items() if key not in _MAY_DIFFER}
    tokenizer = None
    if find_model_file(directory) is not None:
        tokenizer = load_tokenizer(directory, None, None, AS_OPTION).fingerprint
    return {"config": model, "tokenizer": tokenizer}


def _check_tensors(directory: Path, first: Path) -> None:
    """Refuse classes of one shape whose tensors are not cut alike."""
    try:
        one, other = (read_source(each).target.family for each in (directory, first))
    except UserError:
        return
    if one.rows != other.rows:
        raise UserError(f"{directory}: is a {one.model_class}, {first} a {other.model_class}, whose tensors are cut "
                        "otherwise; import both, and merge the two runs")


def _copy_all_but_weights(directory: Path, work: Path) -> None:
    left_out = {RECORD, MERGE_RECORD, "README.md", _INDEX}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in left_out and path.suffix not in (".safetensors", *PICKLES):
            target = work / path.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _write_weights(weights: list[DirectoryWeights], recipe: Recipe, work: Path) -> None:
    """safetensors in the files of the first. Its library writes a file from memory as a whole; here it is written as
    the tensors are made: a header with every tensor's place, then their bytes in that order."""
    places, index = weights[0].files.places, {}
    for file in weights[0].files.files:
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in (name for name, place in places.items() if place.file == file):
            dtype = dtype_of(weights, name)
            begin, end = end, end + places[name].bytes // places[name].dtype.itemsize * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(places[name].shape), "data_offsets": [begin, end]}
            index[name] = file.name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with HashedFile(work / file.name) as written:
            written.write(len(text).to_bytes(8, "little") + text)
            for name in list(header)[1:]:
                for _, block in blocks(weights, name, recipe):
                    written.write(block.contiguous().view(torch.uint8).numpy())
            written.finish()
    if len(weights[0].files.files) > 1:
        total = sum((work / file.name).stat().st_size for file in weights[0].files.files)
        write_json_atomic(work / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _origin(directory: Path) -> dict:
    """Which model it was: its path, its history if we exported it, else the sha256 of its files."""
    record = read_object(directory / RECORD)
    if "history_hash" in record:
        return {"path": str(directory), **{key: record.get(key) for key in ("history_hash", "step", "as")}}
    files = TensorFiles(directory).files
    return {"path": str(directory), "sha256": {file.name: sha256_file(file) for file in files}}


def _card(about: dict) -> str:
    lines = [f"- {weight:.6g} × `{model['path']}`" + (
        f", step {model['step']}, history hash `{model['history_hash']}`" if "history_hash" in model else
        "".join(f", `{name}` (sha256 `{digest}`)" for name, digest in model["sha256"].items()))
        for weight, model in zip(about["weights"], about["models"], strict=True)]
    return ("---\nlibrary_name: transformers\ntags: [megatron_encdec, merge]\n---\n# A merge of "
            f"{len(lines)} models\n\nMade by `megatron-encdec merge --method {about['method']}` of\n\n"
            + "\n".join(lines) + "\n\nConfig and tokenizer are the first's.\n")
