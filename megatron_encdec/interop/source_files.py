"""What a Hugging Face directory says beside config.json and the weights, where that makes another model of it.

    1. `check_files(directory, ignore)`     adapters, files that transformers reads in place of others, files that
                                            cannot be read: refused by name, or a remark where `--ignore` says so
    2. `tokenizer_remarks(...)`             where transformers reads the tokenizer otherwise, or config.json means
                                            other tokens: nothing of it is in the weights, so it is said, not refused
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_encdec.interop.hugging_face import quiet
from megatron_encdec.interop.mask_token import FILES
from megatron_encdec.interop.tokenizer_files import SAMPLES
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import refuse_pointer
from megatron_encdec.text.tokenizer import Tokenizer
from megatron_encdec.text.tokenizer_models import find_model_file

_OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SHOWN = 4  # tokens of a list


def check_files(directory: Path, ignore: Collection[str] = ()) -> list[str]:
    """Remarks on files beside the model's own. Raises `UserError` for one that changes it or cannot be read."""
    for name in ("generation_config.json", *FILES):
        refuse_pointer(directory / name)
        if (directory / name).is_symlink() and not (directory / name).exists():
            raise UserError(f"{directory / name}: a link to {(directory / name).readlink()}, which is not there; bring "
                            "the file, or remove the link")
    contents = {name: _read_object(directory / name) for name in _OBJECTS if (directory / name).is_file()}
    files = contents.get("tokenizer_config.json", {}).get("fast_tokenizer_files")
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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); it may be cut short: copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of keys")
    return content


def tokenizer_remarks(directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> list[str]:
    """How `AutoTokenizer` reads `directory`, where that is not how `tokenizer` does; ids of `config` that disagree."""
    import transformers

    file = find_model_file(directory).name
    try:
        with quiet():
            theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True,
                                                                trust_remote_code=False)
    except Exception as error:  # whatever its class stumbles over
        reason = " ".join(str(error).split())[:150]
        return [f"transformers cannot load this tokenizer ({reason}); training and exports go by {file}"]
    remarks = []
    more = sorted(token for token in theirs.get_vocab() if tokenizer.id(token) is None)
    if more:
        remarks.append(f"{file} lacks {len(more)} tokens that transformers adds from other files "
                       f"({', '.join(more[:_SHOWN])}): texts are encoded without them")
    for text in SAMPLES:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        if ids != tokenizer.encode(text):
            remarks.append(f"transformers' {type(theirs).__name__} encodes {text!r} as {ids[:8]}, {file} as "
                           f"{tokenizer.encode(text)[:8]}: training and exports go by {file}")
            break
    return remarks + [remark for kind in ("bos", "eos", "pad", "mask") if (remark := _other_id(kind, config, theirs))]


def _other_id(kind: str, config: dict[str, Any], theirs) -> str | None:
    """What to say where config.json and the tokenizer name different tokens for the same use."""
    said, named = config.get(f"{kind}_token_id"), getattr(theirs, f"{kind}_token_id")
    if said is None or named is None or named in (said if isinstance(said, list) else [said]):
        return None
    return (f"config.json has {kind}_token_id {said}, the tokenizer's {kind} token is "
            f"{theirs.convert_ids_to_tokens(named)!r} (id {named}): the tokenizer's is used")
