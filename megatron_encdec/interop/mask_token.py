"""The mask token of an imported model: its tokenizer's own, else a reserved one claimed, else one added.

    1. `choose_mask(...)`        which, and the tokenizer with it  ->  `Mask`
    2. `write_with_mask(...)`    the tokenizer's files for the run, the mask named in them

An own mask keeps its rows, and so does a reserved token, unless training never touched it (its row is next to
nothing beside the others). An added token's rows, and an untouched one's, are the mean of all rows of the vocabulary:
a mask then begins as the average word, at the scale that the first norm expects.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_encdec.interop.source_files import copy_tokenizer_files, read_object
from megatron_encdec.interop.tokenizer_files import SAMPLES
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.text.tokenizer import AS_OPTION, Tokenizer, load_tokenizer
from megatron_encdec.text.tokenizer_models import SentencePieceModel, find_model_file, parse_sentencepiece

ADDED = "<|mask|>"
KINDS = {"own": "the tokenizer's own", "reserved": "a reserved token that nothing used",
         "added": "added, its row the mean of all rows", "none": "none"}


@dataclass(frozen=True)
class Mask:
    """The mask token; `kind` none: there is none, `token` and `id` are None."""

    kind: Literal[tuple(KINDS)]
    token: str | None = None
    id: int | None = None


def choose_mask(tokenizer: Tokenizer, wish: str) -> Mask:
    """`wish`: auto, none, or the name of an existing token. An added mask's id comes with its tokenizer."""
    if wish == "none":
        return Mask("none")
    if wish != "auto":
        named = load_tokenizer(tokenizer.path, wish, setting=AS_OPTION)
        return Mask("own" if named.mask_id == tokenizer.mask_id else "reserved", wish, named.mask_id)
    if tokenizer.mask_id is not None:
        return Mask("own", tokenizer.token(tokenizer.mask_id), tokenizer.mask_id)
    directory = find_model_file(tokenizer.path).parent
    used = _in_use(tokenizer, directory)
    if free := [token for token in tokenizer.reserved_tokens() if tokenizer.id(token) not in used]:
        return Mask("reserved", free[0], tokenizer.id(free[0]))
    listed = read_object(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    beside = {id_: token for token, id_ in read_object(directory / "added_tokens.json").items()} | {
        int(id_): token["content"] for id_, token in listed.items()}
    if (taken := beside.get(tokenizer.vocabulary_size)) is not None:
        raise UserError(f"{tokenizer.path}: an added mask would have id {tokenizer.vocabulary_size}, which belongs to "
                        f"{taken!r} by added_tokens.json or tokenizer_config.json; name a token with --mask-token, or "
                        "import with --mask-token none")
    return Mask("added", ADDED)


def _in_use(tokenizer: Tokenizer, directory: Path) -> set[int]:
    """Ids that the tokenizer's own config calls by a name (padding, beginning, ...)."""
    named = [value.get("content") if isinstance(value, dict) else value
             for file in ("tokenizer_config.json", "special_tokens_map.json")
             for key, value in read_object(directory / file).items() if key.endswith("_token")]
    return {tokenizer.eod_id, tokenizer.pad_id, *(tokenizer.id(token) for token in named if isinstance(token, str))}


def write_with_mask(tokenizer: Tokenizer, mask: Mask, directory: Path) -> tuple[Tokenizer, Mask]:
    """Files of `tokenizer` with `mask` in `directory` (there, empty); both as they are then."""
    source = find_model_file(tokenizer.path)
    copy_tokenizer_files(source.parent, directory)
    if not (directory / source.name).is_file():  # a model file under a name of its own
        sentencepiece = isinstance(tokenizer.model, SentencePieceModel)
        shutil.copyfile(source, directory / ("tokenizer.model" if sentencepiece else "tokenizer.json"))
    if mask.kind == "added":
        _add(tokenizer, source, directory)
    if mask.kind != "none":
        config, old = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
        write_json_atomic(config, {**read_object(config), "mask_token": mask.token})
        if old.is_file():  # in old layouts it goes before tokenizer_config.json
            write_json_atomic(old, {**read_object(old), "mask_token": mask.token})
    found = load_tokenizer(directory, mask.token, tokenizer.token(tokenizer.eod_id))
    for text in SAMPLES if mask.kind == "added" else ():
        if found.encode(text) != tokenizer.encode(text):
            raise UserError(f"{tokenizer.path}: with a mask token added it encodes {text!r} differently; name a token "
                            "that it has with --mask-token")
    return found, Mask(mask.kind, mask.token, found.mask_id if mask.kind != "none" else None)


def _add(tokenizer: Tokenizer, source: Path, directory: Path) -> None:
    """One more special token at the end: of the same kind of file, so that data written without it goes on to fit."""
    if isinstance(tokenizer.model, SentencePieceModel):
        proto = parse_sentencepiece(source.read_bytes())
        proto.pieces.add(piece=ADDED, score=0.0, type=proto.SentencePiece.CONTROL)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        find_model_file(directory).write_bytes(proto.SerializeToString())
        return
    content = read_object(source)
    content.setdefault("added_tokens", []).append({
        "id": tokenizer.vocabulary_size, "content": ADDED, "single_word": False, "lstrip": True, "rstrip": False,
        "normalized": False, "special": True})
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    path = directory / "tokenizer_config.json"
    config = read_object(path)
    if config.pop("added_tokens_decoder", None) is not None:  # an older list of added tokens, incomplete now, would win
        write_json_atomic(path, config)
