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

from megatron_encdec.interop.tokenizer_files import SAMPLES
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.text.tokenizer import AS_OPTION, Tokenizer, load_tokenizer
from megatron_encdec.text.tokenizer_models import MODEL_FILES, SentencePieceModel, find_model_file, parse_sentencepiece

ADDED = "<|mask|>"
FILES = (*MODEL_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
         "vocab.json", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class Mask:
    """The mask token; `kind` none: there is none, `token` and `id` are None."""

    kind: Literal["own", "reserved", "added", "none"]
    token: str | None = None
    id: int | None = None


def copy_tokenizer_files(source: Path, directory: Path) -> list[str]:
    """The tokenizer's files as they are; their names."""
    names = [name for name in FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, directory / name)
    return names


def choose_mask(tokenizer: Tokenizer, wish: str) -> Mask:
    """`wish`: auto, none, or the name of an existing token. An added mask's id comes with its tokenizer."""
    if wish == "none":
        return Mask("none")
    if wish != "auto":
        named = load_tokenizer(tokenizer.path, wish, setting=AS_OPTION)
        return Mask("own" if named.mask_id == tokenizer.mask_id else "reserved", wish, named.mask_id)
    if tokenizer.mask_id is not None:
        return Mask("own", tokenizer.token(tokenizer.mask_id), tokenizer.mask_id)
    free = [token for token in tokenizer.reserved_tokens() if tokenizer.id(token) not in _in_use(tokenizer)]
    if free:
        return Mask("reserved", free[0], tokenizer.id(free[0]))
    if (taken := _named_beside(tokenizer).get(tokenizer.vocabulary_size)) is not None:
        raise UserError(f"{tokenizer.path}: an added mask would have id {tokenizer.vocabulary_size}, which belongs to "
                        f"{taken!r} by added_tokens.json or tokenizer_config.json; name a token with --mask-token, or "
                        "import with --mask-token none")
    return Mask("added", ADDED)


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
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json_atomic(path, {**config, "mask_token": mask.token})
        path = directory / "special_tokens_map.json"
        if path.is_file():  # in old layouts it goes before tokenizer_config.json
            write_json_atomic(path, {**json.loads(path.read_text(encoding="utf-8")), "mask_token": mask.token})
    found = load_tokenizer(directory, mask.token, tokenizer.token(tokenizer.eod_id))
    if mask.kind == "added":
        for text in SAMPLES:
            if found.encode(text) != tokenizer.encode(text):
                raise UserError(f"{tokenizer.path}: with a mask token added it encodes {text!r} differently; name a "
                                "token that it has with --mask-token")
    return found, Mask(mask.kind, mask.token, found.mask_id if mask.kind != "none" else None)


def _add(tokenizer: Tokenizer, source: Path, directory: Path) -> None:
    """One more special token at the end: of the same kind of file, so that data written without it goes on to fit."""
    if isinstance(tokenizer.model, SentencePieceModel):
        proto = parse_sentencepiece(source.read_bytes())
        proto.pieces.add(piece=ADDED, score=0.0, type=proto.SentencePiece.CONTROL)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        find_model_file(directory).write_bytes(proto.SerializeToString())
        return
    content = json.loads(source.read_text(encoding="utf-8"))
    content.setdefault("added_tokens", []).append({
        "id": tokenizer.vocabulary_size, "content": ADDED, "single_word": False, "lstrip": True, "rstrip": False,
        "normalized": False, "special": True})
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    decoder = directory / "tokenizer_config.json"
    if decoder.is_file():  # older files list the added tokens here too: an incomplete list would win
        config = json.loads(decoder.read_text(encoding="utf-8"))
        if config.pop("added_tokens_decoder", None) is not None:
            write_json_atomic(decoder, config)


def _named_beside(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> token, of those that other files than the model's add to the vocabulary."""
    directory = find_model_file(tokenizer.path).parent
    added, config = (json.loads((directory / name).read_text(encoding="utf-8")) if (directory / name).is_file() else {}
                     for name in ("added_tokens.json", "tokenizer_config.json"))
    listed = {int(id_): token["content"] for id_, token in (config.get("added_tokens_decoder") or {}).items()}
    return {id_: token for token, id_ in added.items()} | listed


def _in_use(tokenizer: Tokenizer) -> set[int]:
    """Ids that the tokenizer's own config calls by a name (padding, beginning, ...)."""
    used = {tokenizer.eod_id, tokenizer.pad_id}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = find_model_file(tokenizer.path).parent / name
        if path.is_file():
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                token = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(token, str):
                    used.add(tokenizer.id(token))
    return used
