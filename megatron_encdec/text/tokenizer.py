"""One face for Hugging Face `tokenizer.json` and SentencePiece `.model` files, with the special ids resolved.

    1. `load_tokenizer(path, mask_token, eod_token)`   file or directory -> `Tokenizer`
    2. special ids                                     the named token, else what the tokenizer says itself
    3. `require_mask(tokenizer)`                       for objectives that cannot do without
    4. `train_tokenizer(texts, size, directory)`       a byte-level BPE of one's own

Text is only text here: a document that contains the characters `<|endoftext|>` is encoded as those
characters, never as the special token, so that a corpus cannot end its own documents or mask itself.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require
from megatron_encdec.rundir.files import write_atomic, write_json_atomic

MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "[SEP]", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
PAD_NAMES = ("<|pad|>", "[PAD]", "<pad>", "<|padding|>")
MODEL_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Tokens that vocabularies keep free for later use: <|reserved_special_token_0|>, [unused1], <extra_id_0>, ...
RESERVED = re.compile(r"[<\[]\|?_?(reserved|unused|extra|control|placeholder|dummy)[\w-]*\|?[>\]]")
OUR_SPECIAL_TOKENS = ("<|endoftext|>", "<|mask|>", "<|pad|>", *(f"<|reserved_{i}|>" for i in range(5)))


class Tokenizer:
    """A loaded tokenizer.

    `path` (as given), `vocabulary_size` (largest id + 1), `eod_id`, `mask_id` (None where there is none),
    `pad_id` (the tokenizer's own, else `eod_id`), `special_ids` (sorted: special, control and reserved
    tokens), `fingerprint` (hex sha256 of the model file's bytes: the same wherever the file lies).
    """

    def __init__(self, path: str, content: bytes, vocabulary: dict[str, int], special_ids: set[int],
                 encode_batch: Callable[[list[str]], list[list[int]]], decode: Callable[[list[int]], str]):
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocabulary_size = max(vocabulary.values(), default=-1) + 1
        self._ids, self._tokens = vocabulary, {id_: token for token, id_ in vocabulary.items()}
        self._encode_batch, self._decode = encode_batch, decode
        reserved_ids = {id_ for token, id_ in vocabulary.items() if RESERVED.fullmatch(token)}
        self.special_ids = sorted(special_ids | reserved_ids)
        self.mask_id: int | None = None
        self.eod_id: int = -1
        self.pad_id: int = -1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is put in front or behind."""
        return self._encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them."""
        return self._encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return self._decode([int(id_) for id_ in ids])

    def token(self, id_: int) -> str | None:
        """The name of a token, None for an id that is not used."""
        return self._tokens.get(int(id_))

    def id(self, token: str) -> int | None:
        """The id of the token of that name, None if there is none."""
        return self._ids.get(token)

    def reserved_tokens(self) -> list[str]:
        """Names of the tokens that the vocabulary keeps free, by id."""
        return [token for token in map(self.token, self.special_ids) if RESERVED.fullmatch(token)]


def load_tokenizer(path: str | Path, mask_token: str | None = None,
                   eod_token: str | None = None) -> Tokenizer:
    """Load the tokenizer at `path` and resolve its special ids.

    Raises `UserError` if there is no tokenizer, a named token does not exist (near ones are listed), no end
    of document is known, or the mask is the end of document.
    """
    file = find_model_file(path)
    if file is None:
        raise UserError(f"{path}: no tokenizer here; expected a tokenizer.json, a directory that holds one, "
                        f"or a SentencePiece .model")
    content = file.read_bytes()
    load = _load_sentencepiece if file.suffix == ".model" else _load_hugging_face
    tokenizer = load(str(path), file, content)
    own = _own_names(file.parent)
    mask_names = [own["mask_token"], *MASK_NAMES]
    tokenizer.mask_id = _resolve(tokenizer, "mask_token", mask_token, mask_names)
    # The common names go first: chat models name the end of a *turn* as eos.
    eod_id = _resolve(tokenizer, "eod_token", eod_token, [*EOD_NAMES, own["eos_token"]])
    if eod_id is None:
        raise UserError(f"{path}: no end-of-document token found and none named; set tokenizer.eod_token to "
                        f"one of its special tokens{_list_some(tokenizer)}")
    tokenizer.eod_id = eod_id
    if tokenizer.mask_id == eod_id:
        raise UserError(f"{path}: {tokenizer.token(eod_id)!r} is both the mask and the end of document; set "
                        f"tokenizer.mask_token to another token{_list_some(tokenizer)}")
    pad_id = _resolve(tokenizer, "pad_token", None, [own["pad_token"], *PAD_NAMES])
    tokenizer.pad_id = eod_id if pad_id is None else pad_id
    tokenizer.special_ids = sorted({*tokenizer.special_ids, eod_id, tokenizer.pad_id}
                                   | ({tokenizer.mask_id} - {None}))
    return tokenizer


def require_mask(tokenizer: Tokenizer) -> int:
    """The mask's id; raises a `UserError` that says what to set when there is none."""
    if tokenizer.mask_id is None:
        raise UserError(f"no mask token in {tokenizer.path} and none named; set tokenizer.mask_token to a "
                        f"reserved token{_list_some(tokenizer)}")
    return tokenizer.mask_id


def find_model_file(path: str | Path) -> Path | None:
    """The tokenizer's model file at `path` (itself, or inside that directory); None if there is none."""
    path = Path(path)
    if path.is_file():
        return path
    return next((path / name for name in MODEL_FILES if (path / name).is_file()), None)


def _load_hugging_face(path: str, file: Path, content: bytes) -> Tokenizer:
    library = require("tokenizers", f"the tokenizer {path}")
    try:
        model = library.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # noqa: BLE001  (the library raises nothing more precise)
        raise UserError(f"{file}: not a tokenizer.json of the tokenizers library: {error}") from None
    model.no_truncation()  # sentence encoders store a limit of 128 tokens: it would cut documents silently
    model.no_padding()
    model.encode_special_tokens = True
    special_ids = {id_ for id_, token in model.get_added_tokens_decoder().items() if token.special}

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(ids: list[int]) -> str:
        return model.decode(ids, skip_special_tokens=False)

    vocabulary = model.get_vocab(with_added_tokens=True)
    return Tokenizer(path, content, vocabulary, special_ids, encode_batch, decode)


def _load_sentencepiece(path: str, file: Path, content: bytes) -> Tokenizer:
    library = require("sentencepiece", f"the tokenizer {path}")
    model = library.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except Exception as error:  # noqa: BLE001  (as above)
        raise UserError(f"{file}: not a SentencePiece model: {error}") from None
    pieces = range(model.get_piece_size())
    vocabulary = {model.id_to_piece(i): i for i in pieces}
    special_ids = {i for i in pieces if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)}

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [model.encode(text, out_type=int) for text in texts]

    return Tokenizer(path, content, vocabulary, special_ids, encode_batch, model.decode)


def _own_names(directory: Path) -> dict[str, str | None]:
    """What tokenizer_config.json and special_tokens_map.json beside the model call their tokens.

    Where they disagree transformers' order counts: the map, unless tokenizer_config.json lists the added tokens.
    """
    contents = []
    for file in (directory / "special_tokens_map.json", directory / "tokenizer_config.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            content = {}
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot read it: {error}") from None
        contents.append(content if isinstance(content, dict) else {})
    if "added_tokens_decoder" not in contents[1]:
        contents.reverse()
    names: dict[str, str | None] = {"mask_token": None, "eos_token": None, "pad_token": None}
    for content in contents:
        for key, known in names.items():
            value = content.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            names[key] = value if isinstance(value, str) else known
    return names


def _resolve(tokenizer: Tokenizer, key: str, named: str | None, known: Iterable[str | None]) -> int | None:
    if named is None:
        return next((tokenizer.id(name) for name in known if name and tokenizer.id(name) is not None), None)
    if (id_ := tokenizer.id(named)) is None:
        raise UserError(f"tokenizer.{key}: {tokenizer.path} has no token {named!r}"
                        f"{_list_some(tokenizer, named)}")
    return id_


def _list_some(tokenizer: Tokenizer, near: str | None = None) -> str:
    """Up to five tokens to choose from: like `near`, else reserved, else special ones."""
    special = [tokenizer.token(id_) for id_ in tokenizer.special_ids]
    names = difflib.get_close_matches(near, special, n=5, cutoff=0.6) if near else []
    names = names or tokenizer.reserved_tokens() or special
    return f" (there are {', '.join(names[:5])})" if names else ""


def train_tokenizer(texts: Iterator[str], vocabulary_size: int, output_dir: str | Path) -> Tokenizer:
    """Train a byte-level BPE of `vocabulary_size` entries and save it as a Hugging Face tokenizer directory.

    The special tokens `<|endoftext|>`, `<|mask|>`, `<|pad|>`, `<|reserved_0|>` .. `<|reserved_4|>` have ids
    0..7, then come the 256 bytes, then merges seen at least twice: a small corpus may give fewer entries. The
    same texts give the same files. Raises `UserError` if the size cannot hold the special tokens and the
    bytes.
    """
    library = require("tokenizers", "training a tokenizer")
    smallest = len(OUR_SPECIAL_TOKENS) + 256
    if vocabulary_size < smallest:
        raise UserError(f"train-tokenizer: {vocabulary_size} entries are too few: {smallest} are taken by "
                        f"the bytes and special tokens; several thousand are usual")
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    # The mask takes the blank before it along, as the words that it stands for do in a byte-level BPE.
    special = [library.AddedToken(name, lstrip=name == "<|mask|>", normalized=False, special=True)
               for name in OUR_SPECIAL_TOKENS]
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=special, min_frequency=2,
                                          initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>",
              "eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False}
    write_json_atomic(directory / "tokenizer_config.json", config)
    write_atomic(directory / "tokenizer.json", model.to_str(pretty=True))  # last: its presence means complete
    return load_tokenizer(directory)
