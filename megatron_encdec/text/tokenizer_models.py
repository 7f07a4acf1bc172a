"""The two kinds of model file behind a tokenizer, each with an encoder to which special tokens are only text.

    1. `find_model_file(path)`, `load_model(path)`   which file it is, what kind, or why it is none
    2. `model.hide(ids)`                             the special entries get names that no text can hold
    3. `model.encode_batch(texts)`                   ids; never a hidden one
    4. `model.word_starts()`                         the entries that begin a word
    5. `model.deciding()`                            all that decides a text's ids: what a fingerprint is made of

A tokenizer may meet its special tokens in a text at three places: among the added tokens, as a piece of the model's
own vocabulary (Unigram, WordLevel, WordPiece), or as a user-defined piece (SentencePiece). Hiding renames the entry (or
makes it a control piece) for the encoder; ids and all other entries stay. A BPE whose merges make none of them, as
nearly all are, does not need that: its library can take special tokens as text. Dropout, which belongs to training the
tokenizer, and limits of a text's length are left out as well.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import orjson
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, pre_tokenizers

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import refuse_pointer

MODEL_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
HIDDEN = "\ufdd0"  # starts a hidden name: a noncharacter, which Unicode keeps out of texts
_BYTE_BLANKS = ("\u0120", "\u010a", "\u0109", "\u010d")  # blank, line feed, tab, carriage return in byte-level BPE
_UNWANTED = ("truncation", "padding")  # sentence encoders store a limit of 128 tokens: it would cut documents silently
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")


class HuggingFaceModel:
    """A `tokenizer.json`."""

    def __init__(self, content: bytes):
        self._content = orjson.loads(content)
        self._named = self._plain = Tokenizer.from_str(content.decode("utf-8"))
        self._hidden, self._added = frozenset(), self._content.get("added_tokens") or []
        model, added = self._content["model"], self._named.get_added_tokens_decoder()
        self._as_it_is = not model.get("dropout")
        self.vocabulary = self._named.get_vocab(with_added_tokens=True)  # name -> id
        self.added = [token.content for token in added.values()]
        self.special_ids = {id_ for id_, token in added.items() if token.special}
        unknown = model.get("unk_token")  # for text that it does not know; there may be none
        self.unknown_id = self.vocabulary.get(unknown) if unknown else model.get("unk_id")

    def hide(self, ids: set[int]) -> None:
        """Give the entries `ids` names that no text holds, in what encodes."""
        content, names = self._content, {name: f"{HIDDEN}{id_}" for name, id_ in self.vocabulary.items() if id_ in ids}
        self._hidden = names.keys()
        content |= dict.fromkeys(_UNWANTED)
        if content["model"].get("dropout"):
            content["model"]["dropout"] = None
        if self._merges_make_none_of(names.keys()):
            self._named.no_truncation()
            self._named.no_padding()
            self._named.encode_special_tokens = True
            return
        for token in self._added:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "special": True, "normalized": False}
        model, vocabulary = content["model"], content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(name, name): id_ for name, id_ in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:  # one that would make a hidden name goes
            model["merges"] = [[left, right] for made, left, right in _merges(model)
                               if not (made in names or left in names or right in names)]
        self._plain = Tokenizer.from_str(orjson.dumps(content).decode())

    def _merges_make_none_of(self, names: Collection[str]) -> bool:
        """Whether the library gives none of `names` for a text by itself, if special tokens are text to it."""
        model = self._content["model"]
        if "merges" not in model or model.get("ignore_merges") or not self._as_it_is:
            return False
        if any(token["content"] in names and not token.get("special") for token in self._added):
            return False
        return min(map(len, names), default=2) > 1 and not any(made in names for made, _, _ in _merges(model))

    def forget_unknown(self) -> bool:
        """Do without the unknown token, where the model can: a BPE then leaves out what it does not know."""
        if "merges" in self._content["model"]:
            self._content["model"]["unk_token"] = self.unknown_id = None
            self._as_it_is = False
        return self.unknown_id is None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; none where it holds something that the model can only answer with an error."""
        try:
            return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception:  # noqa: BLE001  (an unknown character, and no unknown token)
            return [[]] if len(texts) == 1 else [self.encode_batch([text])[0] for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens by their own names."""
        return self._named.decode(ids, skip_special_tokens=False)

    @property
    def may_fail(self) -> bool:
        """Whether one unknown character may leave a whole text without ids: no unknown token, where one is needed."""
        return self.unknown_id is None and "merges" not in self._content["model"]

    @property
    def drops(self) -> bool:
        """Whether characters may vanish: a BPE without unknown token and bytes leaves out what it does not know."""
        return self._alphabet is not None

    def dropped(self, text: str) -> int:
        """Characters of `text` that vanish, where some may."""
        normalize, split = self._plain.normalizer, self._plain.pre_tokenizer
        text = normalize.normalize_str(text) if normalize else text
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)] if split else [text]
        return sum(character not in self._alphabet for piece in pieces for character in piece)

    @cached_property
    def _alphabet(self) -> set[str] | None:
        """All characters that a BPE knows, where it has no answer to others; else None."""
        model = self._content["model"]
        if "merges" not in model or self.unknown_id is not None or model.get("byte_fallback"):
            return None
        affixes = (model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or "")
        known = {name.removeprefix(affixes[0]).removesuffix(affixes[1]) for name in model["vocab"]}
        known = {name for name in known if len(name) == 1}
        by_bytes = "ByteLevel" in json.dumps([self._content.get("normalizer"), self._content.get("pre_tokenizer")])
        return None if by_bytes and known >= set(pre_tokenizers.ByteLevel.alphabet()) else known

    def word_starts(self) -> set[int]:
        """Ids of the entries that begin a word: that hold the blank before it, or lack the mark of a word's inside;
        none where the model marks neither."""
        model = self._content["model"]
        rules = json.dumps([self._content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")])
        inside = model.get("continuing_subword_prefix")
        if inside or model.get("type") == "WordLevel":
            return {id_ for name, id_ in self.vocabulary.items() if not (inside and name.startswith(inside))}
        if model.get("end_of_word_suffix"):
            return set()
        blanks = (" ",) + (_BYTE_BLANKS if "ByteLevel" in rules else ("\u2581",))
        return {id_ for name, id_ in self.vocabulary.items() if name.startswith(blanks)}

    def for_gigatoken(self):
        """gigatoken's form of what encodes."""
        import gigatoken

        content = self._content | {"added_tokens": [token for token in self._added if not token.get("special")]}
        return gigatoken.Tokenizer.from_json(orjson.dumps(content).decode()).backend

    def ordinary_added(self) -> list[str]:
        """Names of the added tokens that a text may hold."""
        return [token["content"] for token in self._added if not token.get("special")]

    def deciding(self) -> dict:
        """What decides a text's ids, the same for every way of writing it down. The library writes all defaults out;
        what is absent, false or empty is left out here, so that a key which a later version of it adds changes
        nothing."""
        content = orjson.loads(self._plain.to_str())
        model = content["model"] | {"unk_token": None, "unk_id": None, "unknown": self.unknown_id}
        vocabulary = [(*entry, place) for place, entry in enumerate(model["vocab"])] if isinstance(
            model["vocab"], list) else sorted(model["vocab"].items(), key=lambda entry: entry[1])
        model["vocab"] = [entry for entry in vocabulary
                          if not (entry[0] in self._hidden or entry[0].startswith(HIDDEN))]
        tokens = [token for token in content["added_tokens"] if not token["special"]]
        return _without_defaults({"normalizer": content["normalizer"], "pre_tokenizer": content["pre_tokenizer"],
                                  "model": model, "added_tokens": sorted(tokens, key=lambda token: token["id"])})


def _merges(model: dict) -> Iterator[tuple[str, str, str]]:
    """What each merge of a BPE makes, and of what; older files have the pair as one string."""
    prefix = model.get("continuing_subword_prefix") or ""
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        yield left + right.removeprefix(prefix), left, right


def _without_defaults(value):
    if isinstance(value, dict):
        kept = {key: _without_defaults(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if not (one is None or one is False or one in ("", [], {}))}
    return [_without_defaults(one) for one in value] if isinstance(value, list) else value


class SentencePieceModel:
    """A SentencePiece model file; the same face as `HuggingFaceModel`."""

    may_fail = drops = False  # what the model does not know becomes the unknown token

    def __init__(self, content: bytes):
        self._content = content
        self._named = self._plain = model = SentencePieceProcessor(model_proto=content)
        pieces = range(model.get_piece_size())
        self.vocabulary, self.added = {model.id_to_piece(i): i for i in pieces}, self.ordinary_added()
        self.special_ids = {i for i in pieces if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)}
        self.unknown_id = model.unk_id()

    def hide(self, ids: set[int]) -> None:
        """Make control pieces, which no text gives, of those pieces among `ids` that a text would give."""
        proto = parse_sentencepiece(self._content)
        kinds = proto.SentencePiece
        for id_ in ids:
            if proto.pieces[id_].type in (kinds.NORMAL, kinds.USER_DEFINED):
                proto.pieces[id_].type = kinds.CONTROL
        self._content = proto.SerializeToString()
        self._plain = SentencePieceProcessor(model_proto=self._content)

    def forget_unknown(self) -> bool:
        """SentencePiece always has its unknown token."""
        return False

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._plain.encode(text, out_type=int) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._named.decode(ids)

    def word_starts(self) -> set[int]:
        """Ids of the pieces that begin a word; none where blanks are written behind words."""
        if parse_sentencepiece(self._content).trainer_spec.treat_whitespace_as_suffix:
            return set()
        return {id_ for piece, id_ in self.vocabulary.items() if piece.startswith((" ", "\u2581"))}

    def for_gigatoken(self):
        import gigatoken

        return gigatoken.Tokenizer.from_sentencepiece(self._content).backend

    def ordinary_added(self) -> list[str]:
        """Names of the user-defined pieces that a text may hold."""
        proto = parse_sentencepiece(self._content)
        return [piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.USER_DEFINED]

    def deciding(self) -> dict:
        """What decides a text's ids: pieces that a text may give, the rules for blanks and characters."""
        proto = parse_sentencepiece(self._content)
        kinds, trained = proto.SentencePiece, proto.trainer_spec
        pieces = [[piece.piece, piece.score, piece.type, id_] for id_, piece in enumerate(proto.pieces)
                  if piece.type not in (kinds.CONTROL, kinds.UNKNOWN)]
        rules = proto.normalizer_spec
        return {"pieces": pieces, "unknown": self.unknown_id, "model": trained.model_type,
                "byte_fallback": trained.byte_fallback, "blank_behind": trained.treat_whitespace_as_suffix,
                "characters": rules.precompiled_charsmap.hex(), "blank_before": rules.add_dummy_prefix,
                "fewer_blanks": rules.remove_extra_whitespaces, "blanks_marked": rules.escape_whitespaces}


def parse_sentencepiece(content: bytes):
    """A SentencePiece model file as its protocol buffer."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(content)
    return proto


TokenizerModel = HuggingFaceModel | SentencePieceModel


def load_model(path: str | Path) -> TokenizerModel:
    """Load the tokenizer's model file at `path`; the kind follows from its content, not its name. Raises `UserError`
    that says what is there instead, and how to come to a tokenizer that can be read."""
    file = find_model_file(path)
    if file is None:
        raise UserError(f"{path}: {_what_is_there(Path(path))}")
    refuse_pointer(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot read the tokenizer: {error.strerror}") from None
    is_json = content.lstrip().startswith((b"{", b"["))
    try:
        return HuggingFaceModel(content) if is_json else SentencePieceModel(content)
    except Exception as error:  # noqa: BLE001  (the libraries raise nothing more precise)
        what = _what_json_it_is(file, content, error) if is_json else _what_file_it_is(file, content, error)
        raise UserError(f"{file}: {what}") from None


def find_model_file(path: str | Path) -> Path | None:
    """The tokenizer's model file at `path` (itself, or inside that directory); None if there is none."""
    path = Path(path)
    if path.is_file():
        return path
    versions = sorted(path.glob("tokenizer.model.v[0-9]*"), reverse=True)  # as Mistral names them
    return next((file for file in [*(path / name for name in MODEL_FILES), *versions] if file.is_file()), None)


def _what_is_there(path: Path) -> str:
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if older := names & {"vocab.txt", "vocab.json", "merges.txt"}:
        kind = "BertTokenizer" if "vocab.txt" in older else "GPT2Tokenizer"
        kind = "AutoTokenizer" if names & {"config.json", "tokenizer_config.json"} else kind
        return (f"holds {', '.join(sorted(older))}, the older form of a tokenizer, and no tokenizer.json; make one: "
                f"python -c \"from transformers import {kind} as T; T.from_pretrained('{path}').save_pretrained("
                f"'{path}')\"")
    if tiktoken := sorted(name for name in names if name.endswith((".tiktoken", "tekken.json"))):
        return f"no tokenizer here but {tiktoken[0]}; {_FROM_TIKTOKEN}"
    absent = "" if path.exists() else ": no such file or directory"
    return (f"no tokenizer here{absent}; expected a tokenizer.json, a directory that holds one, or a SentencePiece "
            ".model")


_FROM_TIKTOKEN = ("a tiktoken file holds neither the rule that splits a text nor the special tokens; use the "
                  "tokenizer.json of the same model (Llama 3 has it one directory above original/), or make one with "
                  "transformers.convert_slow_tokenizer.TikTokenConverter(vocab_file=..., pattern=..., "
                  "extra_special_tokens=[...]).converted().save('tokenizer.json')")


def _what_json_it_is(file: Path, content: bytes, error: Exception) -> str:
    try:
        found = json.loads(content)
    except ValueError as wrong:
        return f"not a tokenizer.json: it is not valid JSON ({wrong}); copy it again"
    if isinstance(found, dict) and isinstance(found.get("config"), dict) and isinstance(found.get("vocab"), list):
        return f"a tekken.json; {_FROM_TIKTOKEN}"
    if isinstance(found, dict) and "model" not in found:
        beside = file.parent / "tokenizer.json"
        there = f"; name {beside}" if beside.is_file() and beside != file else ""
        return f'not a tokenizer.json of the tokenizers library: it has no key "model"{there}'
    return f"not a tokenizer.json of the tokenizers library: {error}"


def _what_file_it_is(file: Path, content: bytes, error: Exception) -> str:
    if _TIKTOKEN.match(content):
        return f"a tiktoken file, not a SentencePiece model; {_FROM_TIKTOKEN}"
    if file.name == "vocab.txt":
        return _what_is_there(file.parent)
    if file.suffix == ".txt":
        return "a text file, not a tokenizer"
    if file.suffix == ".json":
        return f"not a tokenizer.json: it does not start as JSON does ({len(content):,} bytes); copy it again"
    return f"not a SentencePiece model: {' '.join(str(error).split())[:200]}"


def own_names(file: Path, keys: Iterable[str]) -> dict[str, str | None]:
    """What tokenizer_config.json and special_tokens_map.json beside the model call their tokens, by key. Where they
    disagree transformers' order counts: the map, unless tokenizer_config.json lists the added tokens."""
    contents = [_json_of(file.with_name(name)) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    if "added_tokens_decoder" not in contents[1]:
        contents.reverse()
    names: dict[str, str | None] = dict.fromkeys(keys)
    for content in contents:
        found = {key: value.get("content") if isinstance(value, dict) else value for key, value in content.items()}
        names |= {key: found[key] for key in names if isinstance(found.get(key), str)}
    return names


def _json_of(path: Path) -> dict:
    """The JSON object at `path`, {} where there is none."""
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it: {error}") from None
    return content if isinstance(content, dict) else {}
