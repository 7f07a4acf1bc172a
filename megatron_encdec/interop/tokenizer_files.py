"""The tokenizer in a Hugging Face directory, such that `AutoTokenizer` encodes as preprocessing did.

    1. `write_tokenizer(...)`     tokenizer.json, and tokenizer_config.json naming mask, end and padding; SentencePiece
                                  is converted, or copied as it is where the conversion encodes otherwise
    2. `check_tokenizer(...)`     loads it back and compares the ids of sample texts
    3. `tokenizer_remarks(...)`   what an import has to say of its tokenizer
    4. `about_empty_texts(...)`   what an encoder's user has to know where an empty text has no token, so no mean

The mask takes the blank before it along (`lstrip`): in BPE and SentencePiece vocabularies a word's token
holds that blank, and so did every token that the mask stood for in training.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_encdec.interop.hugging_face import quiet
from megatron_encdec.interop.source_files import read_object
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.text.tokenizer import Tokenizer
from megatron_encdec.text.tokenizer_models import SentencePieceModel, find_model_file, own_names, parse_sentencepiece

SAMPLES = ("Hello world", "two  spaces, a tab\there\nand lines\n\n", "naïve café — 東京 🙂",
           "x = f(y)[0]; y += 1.5e-3", "don't STOP", "ﬁne ½ Ⅷ", "")
_CARRIED = ("bos_token", "unk_token", "sep_token", "cls_token")  # of the tokenizer's own config
_SHOWN = 8  # ids of a text


def _auto_tokenizer(directory: Path):
    import transformers

    with quiet():
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _first_difference(theirs, tokenizer: Tokenizer) -> tuple[str, list[int], list[int]] | None:
    """A sample text, and the first ids of it by transformers' tokenizer and by ours, where they differ."""
    for text in SAMPLES:
        found, ours = theirs(text, add_special_tokens=False)["input_ids"], tokenizer.encode(text)
        if found != ours:
            return text, found[:_SHOWN], ours[:_SHOWN]
    return None


def write_tokenizer(tokenizer: Tokenizer, directory: Path, sequence_length: int) -> list[str]:
    """Write the tokenizer's files into `directory`; remarks for the user, mostly none.

    Raises `UserError` where a `tokenizer.json` does not give back the ids that training saw.
    """
    file = find_model_file(tokenizer.path)
    if isinstance(tokenizer.model, SentencePieceModel):
        return _write_sentencepiece(tokenizer, file, directory, sequence_length)
    content = read_object(file)
    if _take_blank(content, tokenizer.mask_id):
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(file, directory / "tokenizer.json")
    own = {key: name for key, name in own_names(file, _CARRIED).items() if name is not None}
    _write_config(tokenizer, own, directory, sequence_length)
    if fault := check_tokenizer(tokenizer, directory):
        raise UserError(f"{tokenizer.path}: transformers reads this tokenizer differently ({fault})")
    processor = content.get("post_processor") or {}
    parts = [processor, *processor.get("processors", [])]
    added = [name for part in parts for name in (part.get("special_tokens") or {})]
    added += [part[key][0] for part in parts for key in ("cls", "sep") if isinstance(part.get(key), list)]
    return [f"the tokenizer puts {', '.join(added)} around a text; pretraining never did: for the same input call it "
            "with add_special_tokens=False"] if added else []


def _take_blank(content: dict, mask_id: int | None) -> bool:
    """Let the mask take the blank before it along; whether that changed `content`."""
    masks = [token for token in content.get("added_tokens", []) if token["id"] == mask_id and not token["lstrip"]]
    for token in masks:
        token["lstrip"] = True
    return bool(masks)


def check_tokenizer(tokenizer: Tokenizer, directory: Path) -> str | None:
    """What `AutoTokenizer` does otherwise than `tokenizer`, or None."""
    loaded = _auto_tokenizer(directory)
    for name, ours, theirs in (("mask", tokenizer.mask_id, loaded.mask_token_id),
                               ("end of document", tokenizer.eod_id, loaded.eos_token_id),
                               ("padding", tokenizer.pad_id, loaded.pad_token_id)):
        if ours != theirs:
            return f"its {name} has id {theirs}, not {ours}"
    difference = _first_difference(loaded, tokenizer)
    return difference and f"{difference[0]!r} becomes {difference[1]}, not {difference[2]}"


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids of the tokens that the tokenizer's own config calls bos, cls and sep; None where it calls none so."""
    names = own_names(find_model_file(tokenizer.path), ("bos_token", "cls_token", "sep_token"))
    return {key.removesuffix("_token"): None if name is None else tokenizer.id(name) for key, name in names.items()}


def _write_config(tokenizer: Tokenizer, own: dict, directory: Path, sequence_length: int) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **own,
              "eos_token": tokenizer.token(tokenizer.eod_id), "pad_token": tokenizer.token(tokenizer.pad_id),
              "model_max_length": sequence_length, "model_input_names": ["input_ids", "attention_mask"],
              "clean_up_tokenization_spaces": False}
    if tokenizer.mask_id is not None:
        config["mask_token"] = {"__type": "AddedToken", "content": tokenizer.token(tokenizer.mask_id), "lstrip": True,
                                "rstrip": False, "normalized": False, "single_word": False, "special": True}
    write_json_atomic(directory / "tokenizer_config.json", config)


def _write_sentencepiece(tokenizer: Tokenizer, file: Path, directory: Path, sequence_length: int) -> list[str]:
    try:
        content = json.loads(_converted(file).to_str())
        _take_blank(content, tokenizer.mask_id)
        (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        _write_config(tokenizer, {}, directory, sequence_length)
        fault = check_tokenizer(tokenizer, directory)
    except Exception as error:  # whatever the library stumbles over: the model file itself is still of use
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if fault is None:
        return []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink(missing_ok=True)
    shutil.copyfile(file, directory / "tokenizer.model")
    return [f"transformers cannot reproduce this SentencePiece model ({fault}); tokenizer.model is copied as "
            "it is: encode with the sentencepiece package"]


def _converted(file: Path):
    """A `tokenizers.Tokenizer` of the SentencePiece model, with the blanks handled as the model says.

    Where the model keeps blanks as they are, a text that starts with one differs by one token: the price of
    no spurious blank after every mask.
    """
    import tokenizers
    import transformers

    with tempfile.TemporaryDirectory() as work:  # transformers wants a directory with this very file name
        shutil.copyfile(file, Path(work) / "tokenizer.model")
        loaded = transformers.PreTrainedTokenizerFast.from_pretrained(work, local_files_only=True)
    model = loaded.backend_tokenizer
    rules, blank = parse_sentencepiece(file.read_bytes()).normalizer_spec, "\N{LOWER ONE EIGHTH BLOCK}"
    normalizers, steps = tokenizers.normalizers, []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
                  normalizers.Replace(" ", blank)]
        steps += [normalizers.Prepend(blank)] if rules.add_dummy_prefix else []
    else:
        scheme = "first" if rules.add_dummy_prefix else "never"
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(blank, prepend_scheme=scheme, split=False)
    model.normalizer = normalizers.Sequence(steps)
    return model


def tokenizer_remarks(directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> list[str]:
    """How transformers reads `directory`, where that is not how `tokenizer` does; ids of `config` that disagree. It is
    said, not refused, because nothing of it is in the weights."""
    file = find_model_file(directory).name
    try:
        theirs = _auto_tokenizer(directory)
    except Exception as error:  # whatever its class stumbles over
        reason = " ".join(str(error).split())[:150]
        return [f"transformers cannot load this tokenizer ({reason}); training and exports go by {file}"]
    remarks = []
    if more := sorted(token for token in theirs.get_vocab() if tokenizer.id(token) is None):
        remarks.append(f"{file} lacks {len(more)} tokens that transformers adds from other files "
                       f"({', '.join(more[:4])}): texts are encoded without them")
    if difference := _first_difference(theirs, tokenizer):
        text, ids, ours = difference
        remarks.append(f"transformers' {type(theirs).__name__} encodes {text!r} as {ids}, {file} as {ours}: training "
                       f"and exports go by {file}")
    for kind in ("bos", "eos", "pad", "mask"):
        said, named = config.get(f"{kind}_token_id"), getattr(theirs, f"{kind}_token_id")
        if None not in (said, named) and named not in (said if isinstance(said, list) else [said]):
            remarks.append(f"config.json has {kind}_token_id {said}, the tokenizer's {kind} token is "
                           f"{theirs.convert_ids_to_tokens(named)!r} (id {named}): the tokenizer's is used")
    return remarks


def about_empty_texts(directory: Path) -> list[str]:
    """A remark where the tokenizer in `directory` gives an empty text no token.

    Nothing in the files can give it one without changing other texts: tokenizers skip normalisation of an empty text,
    and a post-processor puts its tokens around every text.
    """
    try:
        tokenizer = _auto_tokenizer(directory)
    except (OSError, ValueError):  # there is none, or one that transformers cannot read: said elsewhere
        return []
    if tokenizer("")["input_ids"]:
        return []
    instead = next((f"; put {text!r} in its place, or leave it out" for text in (" ", ".")
                    if tokenizer(text)["input_ids"]), "; leave it out")
    return ["an empty text has no token, so it has no embedding: sentence-transformers gives zeros for it in a batch "
            f"and an error for it alone{instead}"]
