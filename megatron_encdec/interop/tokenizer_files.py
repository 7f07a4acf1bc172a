"""The tokenizer beside an exported model, such that `AutoTokenizer` encodes as preprocessing did.

    1. `write_tokenizer(...)`   tokenizer.json, and tokenizer_config.json naming mask, end and padding
    2. SentencePiece            converted to a tokenizer.json
    3. `check_tokenizer(...)`   loads it back and compares the ids of sample texts; a conversion that encodes
                                otherwise is thrown away, and the SentencePiece model itself is copied

The mask takes the blank before it along (`lstrip`): in BPE and SentencePiece vocabularies a word's token
holds that blank, and so did every token that the mask stood for in training.
"""

import json
import shutil
import tempfile
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer
from megatron_encdec.text.tokenizer_models import SentencePieceModel, find_model_file, parse_sentencepiece

SAMPLES = ("Hello world", "two  spaces, a tab\there\nand lines\n\n", "naïve café — 東京 🙂",
           "x = f(y)[0]; y += 1.5e-3", "don't STOP", "ﬁne ½ Ⅷ", "")
_CARRIED = ("bos_token", "unk_token", "sep_token", "cls_token")  # of the tokenizer's own config


def write_tokenizer(tokenizer: Tokenizer, directory: Path, sequence_length: int) -> list[str]:
    """Write the tokenizer's files into `directory`; returns remarks for the user, mostly none.

    Raises `UserError` where a `tokenizer.json` does not give back the ids that training saw.
    """
    file = find_model_file(tokenizer.path)
    if isinstance(tokenizer.model, SentencePieceModel):
        return _write_sentencepiece(tokenizer, file, directory, sequence_length)
    remarks = _write_json(tokenizer, json.loads(file.read_text(encoding="utf-8")), file, directory)
    _write_config(tokenizer, _own_config(file.parent), directory, sequence_length)
    fault = check_tokenizer(tokenizer, directory)
    if fault:
        raise UserError(f"{tokenizer.path}: transformers reads this tokenizer differently ({fault})")
    return remarks


def check_tokenizer(tokenizer: Tokenizer, directory: Path) -> str | None:
    """What `AutoTokenizer` does otherwise than `tokenizer`, or None."""
    import transformers

    loaded = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    for name, ours, theirs in (("mask", tokenizer.mask_id, loaded.mask_token_id),
                               ("end of document", tokenizer.eod_id, loaded.eos_token_id),
                               ("padding", tokenizer.pad_id, loaded.pad_token_id)):
        if ours != theirs:
            return f"its {name} has id {theirs}, not {ours}"
    for text in SAMPLES:
        theirs = loaded(text, add_special_tokens=False)["input_ids"]
        if theirs != tokenizer.encode(text):
            return f"{text!r} becomes {theirs[:8]}, not {tokenizer.encode(text)[:8]}"
    return None


def bos_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that the tokenizer's own config calls the beginning, if it does."""
    file = find_model_file(tokenizer.path)
    name = _own_config(file.parent).get("bos_token")
    return None if name is None else tokenizer.id(name)


def _own_config(directory: Path) -> dict[str, str]:
    """Names that tokenizer_config.json beside the model gives to the tokens that we have no use for."""
    try:
        content = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = {key: content.get(key) for key in _CARRIED}
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in names.items()}
    return {key: value for key, value in names.items() if isinstance(value, str)}


def _write_json(tokenizer: Tokenizer, content: dict, file: Path, directory: Path) -> list[str]:
    remarks, edited = [], False
    for token in content.get("added_tokens", []):
        if token["id"] == tokenizer.mask_id and not token["lstrip"]:
            token["lstrip"] = edited = True
    if edited:
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(file, directory / "tokenizer.json")
    added = _added_around_text(content)
    if added:
        remarks.append(f"the tokenizer puts {', '.join(added)} around a text; pretraining never did: for the "
                       "same input call it with add_special_tokens=False")
    return remarks


def _added_around_text(content: dict) -> list[str]:
    """Special tokens of the post-processor."""
    processor = content.get("post_processor") or {}
    parts = [processor, *processor.get("processors", [])]
    names = [name for part in parts for name in (part.get("special_tokens") or {})]
    names += [part[key][0] for part in parts for key in ("cls", "sep") if isinstance(part.get(key), list)]
    return names


def _write_config(tokenizer: Tokenizer, own: dict, directory: Path, sequence_length: int) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **own,
              "eos_token": tokenizer.token(tokenizer.eod_id), "pad_token": tokenizer.token(tokenizer.pad_id),
              "model_max_length": sequence_length, "model_input_names": ["input_ids", "attention_mask"],
              "clean_up_tokenization_spaces": False}
    if tokenizer.mask_id is not None:
        config["mask_token"] = {"__type": "AddedToken", "content": tokenizer.token(tokenizer.mask_id),
                                "lstrip": True, "rstrip": False, "normalized": False, "single_word": False,
                                "special": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n",
                                                     encoding="utf-8")


def _write_sentencepiece(tokenizer: Tokenizer, file: Path, directory: Path,
                         sequence_length: int) -> list[str]:
    try:
        converted = convert_sentencepiece(file)
        content = json.loads(converted.to_str())
        for token in content["added_tokens"]:
            token["lstrip"] = token["lstrip"] or token["id"] == tokenizer.mask_id
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


def convert_sentencepiece(file: Path):
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
