"""What results are made of, by the contents of files: models and labelled sets.

    1. `fingerprint(files)`     names and contents -> 40 hex digits
    2. `revision_of(model)`     of a model's directory
    3. `made_of(run)`           of a fine-tuning run, {"model", "train", "test", ...}: record.json keeps it, so that
                                scores of other weights or rows are never taken for those asked for

A file is read again only where its size or time has changed.
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from megatron_encdec.finetune.config import DatasetConfig, FinetuneRun
from megatron_encdec.finetune.results_tree import EXPORT, read_json
from megatron_encdec.finetune.rows import files_of
from megatron_encdec.platform.errors import UserError

_WEIGHTS = (".safetensors", ".bin")
_OTHERS = (".json", ".model", ".txt")


def fingerprint(files: Mapping[str, Path]) -> str:
    """A hash of the names of `files` and of what is in them."""
    digest = hashlib.sha256()
    for name in sorted(files, key=Path):
        state = files[name].stat()
        digest.update(f"{name} {_content(files[name], state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:40]


@lru_cache(maxsize=1024)
def _content(path: Path, _size: int, _changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Of all files below `folder`."""
    return fingerprint({str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()})


def revision_of(model: str, weights: bool = True) -> str:
    """A hash of the files of the model in the directory `model`, without its `weights` where nobody reads them."""
    folder = Path(model)
    if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
        raise UserError(f"{model}: no model there (neither config.json nor modules.json)")
    suffixes = _OTHERS + _WEIGHTS * weights
    return fingerprint({str(path.relative_to(folder)): path for path in folder.rglob("*")
                        if path.is_file() and path.suffix in suffixes
                        and not any(part.startswith(".") for part in path.relative_to(folder).parts)})


def made_of(run: FinetuneRun) -> dict[str, str]:
    """Hashes of what `run` reads: the model, the files of the set, the models that mine its negatives. A model that was
    exported here is told by its history."""
    exported = Path(run.model.path) / EXPORT
    if run.model.weights == "random":
        found = {"model": revision_of(run.model.path, weights=False)}
    elif exported.is_file():
        found = {"model": read_json(exported).get("history_hash") or revision_of(run.model.path)}
    else:
        found = {"model": revision_of(run.model.path)}
    for model in run.negatives.models if run.negatives else ():
        found[f"negatives by {Path(model).name}"] = revision_of(model)
    return found | set_made_of(run.dataset)


def set_made_of(dataset: DatasetConfig) -> dict[str, str]:
    """Hashes of the files of a set, those that are there; none of the hub's."""
    return {role: fingerprint({role: path}) for role, path in files_of(dataset).items() if path.is_file()}
