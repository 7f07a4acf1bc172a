"""One face for Hugging Face `tokenizer.json` and SentencePiece `.model` files, with the special ids resolved.

    1. `load_tokenizer(path, mask_token, eod_token)`   file or directory (`TokenizerConfig`) -> `Tokenizer`, with the
                                                       named special tokens, else what the tokenizer says itself
    2. `train_tokenizer(texts, size, directory)`       a byte-level BPE of one's own

Text is only text here: a document that contains the characters `<|endoftext|>` is encoded as those
characters, never as the special token, so that a corpus cannot end its own documents or mask itself.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import orjson
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_atomic, write_json_atomic
from megatron_encdec.text.tokenizer_models import TokenizerModel, find_model_file, load_model, own_names

MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "[SEP]", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
PAD_NAMES = ("<|pad|>", "[PAD]", "<pad>", "<|padding|>")
# Tokens that vocabularies keep free for later use: <|reserved_special_token_0|>, [unused1], <extra_id_0>, ...
RESERVED = re.compile(r"[<\[]\|?_?(reserved|unused|extra|control|placeholder|dummy)[\w-]*\|?[>\]]")
OUR_SPECIAL_TOKENS = ("<|endoftext|>", "<|mask|>", "<|pad|>", *(f"<|reserved_{i}|>" for i in range(5)))
IN_CONFIG, AS_OPTION = "tokenizer.{}_token", "--{}-token"  # where a user names the mask or the end of document
FINGERPRINT_KIND = "ids-"  # by what the tokenizer does; hex alone is of its file's bytes, as earlier versions recorded


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that wrote the data. Its special tokens exist already; name them where it does not."""

    path: str = schema.key("a Hugging Face `tokenizer.json`, a directory that holds one, or a SentencePiece `.model`",
                           later="to another tokenizer that gives the same ids")
    mask_token: str | None = schema.key("the mask token, where the tokenizer names none; a reserved one that nothing "
                                        "else uses makes a good one", None)
    eod_token: str | None = schema.key("the token that ends a document, where the tokenizer names none", None)


class Tokenizer:
    """A loaded tokenizer. `vocabulary_size`: largest id + 1; `mask_id`, `unknown_id`: None where there is none;
    `pad_id`: the tokenizer's own, else `eod_id`; `special_ids`: sorted, special, control and reserved tokens."""

    mask_id: int | None = None
    eod_id = pad_id = -1

    def __init__(self, path: str, model: TokenizerModel):
        self.path, self.model, self.unknown_id = path, model, model.unknown_id
        self.vocabulary_size = max(model.vocabulary.values(), default=-1) + 1
        self._tokens = {id_: token for token, id_ in model.vocabulary.items()}
        reserved_ids = {id_ for token, id_ in model.vocabulary.items() if RESERVED.fullmatch(token)}
        self.special_ids = sorted(model.special_ids | reserved_ids)

    @cached_property
    def fingerprint(self) -> str:
        """What decides the ids of texts and their end, as a hash: two tokenizers with equal ones write the same data.
        Normalizer, splitting, model, the added tokens that a text may hold, and the end of document count; names of
        special tokens, decoders, chat templates and the file's layout do not, nor does a special token more."""
        deciding = orjson.dumps([self.model.deciding(), self.eod_id], option=orjson.OPT_SORT_KEYS)
        return FINGERPRINT_KIND + hashlib.sha256(deciding).hexdigest()

    @cached_property
    def file_sha256(self) -> str:
        """Hex sha256 of the model file: the fingerprint in manifests and checkpoints of earlier versions."""
        return hashlib.sha256(find_model_file(self.path).read_bytes()).hexdigest()

    @cached_property
    def word_start_ids(self) -> frozenset[int] | None:
        """The tokens that begin a word, as the model writes words; None where it does not tell."""
        return frozenset(self.model.word_starts()) or None

    def has_fingerprint(self, recorded: str | None) -> bool:
        """Whether `recorded`, of a manifest or a checkpoint, is this tokenizer's, by meaning or (old ones) by bytes."""
        mine = self.fingerprint if str(recorded).startswith(FINGERPRINT_KIND) else self.file_sha256
        return recorded == mine

    def check_wrote(self, data: str | Path, recorded: str, setting: str) -> None:
        """Raises `UserError` where `data`, of the fingerprint `recorded`, is not of this tokenizer (from `setting`)."""
        if self.has_fingerprint(recorded):
            return
        ways = "name the tokenizer that wrote it, or preprocess again with this one"
        if not recorded.startswith(FINGERPRINT_KIND):
            ways = (f"its manifest is of an earlier version, which knew a tokenizer by the bytes of its file (sha256 "
                    f"{recorded[:12]}): name the unchanged file; or run preprocess once more with that file as at "
                    "first, which encodes nothing again and records what the tokenizer does")
        raise UserError(f"{setting}: {self.path} (fingerprint {self.fingerprint[:16]}) does not give the ids that "
                        f"{data} holds ({recorded[:16]}); {ways}")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is put before or after."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them; none where the tokenizer has no token for a part of it."""
        return self.model.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return self.model.decode([int(id_) for id_ in ids])

    def token(self, id_: int) -> str | None:
        """The name of a token, None for an id that is not used."""
        return self._tokens.get(int(id_))

    def id(self, token: str) -> int | None:
        """The id of the token of that name, None if there is none."""
        return self.model.vocabulary.get(token)

    def reserved_tokens(self) -> list[str]:
        """Names of the tokens that the vocabulary keeps free, by id."""
        return [token for token in map(self.token, self.special_ids) if RESERVED.fullmatch(token)]

    def examples(self, near: str | None = None) -> str:
        """For messages: up to five tokens to choose from, like `near`, else reserved, else special ones."""
        special = list(map(self.token, self.special_ids))
        names = difflib.get_close_matches(near, special, n=5, cutoff=0.6) if near else []
        names = names or self.reserved_tokens() or special
        return f" (there are {', '.join(names[:5])})" if names else ""


def load_tokenizer(path: str | Path, mask_token: str | None = None, eod_token: str | None = None,
                   setting: str = IN_CONFIG) -> Tokenizer:
    """Load the tokenizer at `path` and resolve its special ids. `setting`: where the user names a token, for messages:
    `IN_CONFIG`, or `AS_OPTION` of a command. Raises `UserError` if there is no tokenizer, a named token does not exist
    (near ones are listed), no end of document is known, or mask, end of document and unknown token are not three."""
    tokenizer = Tokenizer(str(path), load_model(path))
    own = own_names(find_model_file(path), ("mask_token", "eos_token", "pad_token"))
    mask, eod = setting.format("mask"), setting.format("eod")
    tokenizer.mask_id = _resolve(tokenizer, mask, mask_token, [own["mask_token"], *MASK_NAMES])
    # The common names go first: chat models name the end of a *turn* as eos.
    eod_id = _resolve(tokenizer, eod, eod_token, [*EOD_NAMES, own["eos_token"]])
    if eod_id is None:
        which = "one of its special tokens" if tokenizer.special_ids else \
            "a token that no text needs (it has no special ones)"
        raise UserError(f"{path}: no end-of-document token found and none named; set {eod} to {which}"
                        f"{tokenizer.examples()}")
    tokenizer.eod_id = eod_id
    if tokenizer.mask_id == eod_id:
        raise UserError(f"{path}: {tokenizer.token(eod_id)!r} is both the mask and the end of document; set "
                        f"{mask} to another token{tokenizer.examples()}")
    pad_id = _resolve(tokenizer, "pad_token", None, [own["pad_token"], *PAD_NAMES])
    tokenizer.pad_id = eod_id if pad_id is None else pad_id
    # No mask or end of document that also stands for every unknown character in the middle of a text.
    for what, key, id_ in (("the end of document", eod, eod_id), ("the mask", mask, tokenizer.mask_id)):
        if id_ is not None and id_ == tokenizer.unknown_id:
            if not tokenizer.model.forget_unknown():
                raise UserError(f"{path}: {tokenizer.token(id_)!r} is {what} and the unknown token too, so unknown "
                                f"text would become it; set {key} to another token{tokenizer.examples()}")
            tokenizer.unknown_id = None
    named = {eod_id, tokenizer.mask_id, tokenizer.unknown_id}
    if tokenizer.token(tokenizer.pad_id) in (*PAD_NAMES, *tokenizer.model.added):
        named.add(tokenizer.pad_id)  # some tokenizers pad with an ordinary token, which texts need
    tokenizer.model.hide({*tokenizer.special_ids, *named} - {None})
    tokenizer.special_ids = sorted({*tokenizer.special_ids, eod_id, tokenizer.mask_id, tokenizer.pad_id} - {None})
    return tokenizer


def require_mask(tokenizer: Tokenizer) -> int:
    """The mask's id; raises a `UserError` that says what to set when there is none."""
    if tokenizer.mask_id is None:
        raise UserError(f"no mask token in {tokenizer.path} and none named; set tokenizer.mask_token to a "
                        f"reserved token{tokenizer.examples()}")
    return tokenizer.mask_id


def _resolve(tokenizer: Tokenizer, setting: str, named: str | None, known: Iterable[str | None]) -> int | None:
    if named is None:
        return next((tokenizer.id(name) for name in known if name and tokenizer.id(name) is not None), None)
    if (id_ := tokenizer.id(named)) is None:
        raise UserError(f"{setting}: {tokenizer.path} has no token {named!r}{tokenizer.examples(named)}")
    return id_


def train_tokenizer(texts: Iterator[str], vocabulary_size: int, output_dir: str | Path) -> Tokenizer:
    """Train a byte-level BPE of `vocabulary_size` entries, saved as a Hugging Face tokenizer directory: ids 0..7 are
    `OUR_SPECIAL_TOKENS`, then come the 256 bytes, then merges seen at least twice, so a small corpus may give fewer.
    The same texts give the same files. Raises `UserError` if the size cannot hold special tokens and bytes."""
    smallest = len(OUR_SPECIAL_TOKENS) + 256
    if vocabulary_size < smallest:
        raise UserError(f"train-tokenizer: {vocabulary_size} entries are too few: {smallest} are taken by "
                        f"the bytes and special tokens; several thousand are usual")
    model = Library(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    # The mask takes the blank before it along, as the words that it stands for do in a byte-level BPE.
    special = [AddedToken(name, lstrip=name == "<|mask|>", normalized=False, special=True)
               for name in OUR_SPECIAL_TOKENS]
    model.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=special, min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>",
              "eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False}
    write_json_atomic(directory / "tokenizer_config.json", config)
    write_atomic(directory / "tokenizer.json", model.to_str(pretty=True))  # last: its presence means complete
    return load_tokenizer(directory)
