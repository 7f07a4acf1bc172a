"""The files of a Hugging Face directory beside its weights: read, checked, copied.

    1. `refuse_stand_in(path)`                      a link to nothing, or a pointer to what was never downloaded
    2. `read_object(path)`                          a JSON object
    3. `check_files(directory, ignore)`             adapters, files that transformers reads in place of others, files
                                                    that cannot be read: refused by name, or a remark by `--ignore`
    4. `copy_tokenizer_files(source, directory)`    the tokenizer's files as they are
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import refuse_pointer
from megatron_encdec.text.tokenizer_models import MODEL_FILES

_OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_FILES = (*MODEL_FILES, *_OBJECTS[1:], "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt")


def refuse_stand_in(path: Path) -> None:
    """Raises `UserError` where `path` is a link to nothing, or a pointer to what was never downloaded."""
    refuse_pointer(path)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to {path.readlink()}, which is not there; bring the file, or remove the link")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is no file. Raises `UserError` where it cannot be read."""
    refuse_stand_in(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); it may be cut short: copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of keys")
    return content


def check_files(directory: Path, ignore: Collection[str] = ()) -> list[str]:
    """Remarks on what `ignore` leaves out. Raises `UserError` for an adapter, for a file that transformers passes over,
    and for one that cannot be read."""
    for name in _TOKENIZER_FILES:
        refuse_stand_in(directory / name)
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
