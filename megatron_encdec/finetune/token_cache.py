"""Tokens of texts, made once for all runs of a tree: RESULTS/.tokens/<key>.npz (row_cache.py).

The key is a hash of the tokenizer, the options and the texts themselves: another file, prefix or tokenizer gives
another key. Legend of shapes: N texts, T tokens of a text.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import orjson
import tokenizers

from megatron_encdec.finetune.row_cache import kept_rows

FOLDER = ".tokens"  # a report passes over names that start with a point
_WIDTHS = {"input_ids": 1, "offset_mapping": 2}


class TokenCache:
    """What `tokenizer` (a fast one of transformers) makes of texts, kept under `folder`."""

    def __init__(self, tokenizer, folder: Path):
        self._tokenizer, self._folder = tokenizer, folder
        self._base = hashlib.sha256(orjson.dumps([
            type(tokenizer).__name__, tokenizers.__version__, tokenizer.backend_tokenizer.to_str(),
            bool(getattr(tokenizer, "split_special_tokens", False))]))

    def __call__(self, texts: Sequence[str], special: bool, offsets: bool = False) -> dict[str, list]:
        """`input_ids` [N][T], and `offset_mapping` [N][T] pairs where asked for. special: with the tokens that the
        tokenizer adds."""
        digest = self._base.copy()
        digest.update(orjson.dumps([special, offsets, list(texts)]))
        widths = {name: _WIDTHS[name] for name in ("input_ids", *["offset_mapping"] * offsets)}

        def made() -> dict[str, list]:
            found = self._tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=offsets,
                                    verbose=False)
            return {name: found[name] for name in widths}

        return kept_rows(self._folder / f"{digest.hexdigest()}.npz", widths, made)
