"""What a tokenizer cannot keep of a text: counted, so that no part of a document is missing without a number.

    1. special tokens that a text spells out and the tokenizer has no tokens for
    2. unknown tokens: each stands for text that is not in the vocabulary
    3. dropped characters: a vocabulary without unknown token and bytes leaves them out

A byte-level vocabulary loses nothing, and pays nothing for the counting.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_encdec.text.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Losses:
    """Counts, under the names that the manifest has."""

    special_tokens_in_text: int = 0
    unknown_tokens: int = 0
    dropped_characters: int = 0


class LossCounter:
    """Counts what `tokenizer` loses of texts."""

    def __init__(self, tokenizer: Tokenizer):
        self._unknown_id = tokenizer.unknown_id
        self._dropped = tokenizer.model.dropped if tokenizer.model.drops else None
        names = [tokenizer.token(id_) for id_ in tokenizer.special_ids if id_ != tokenizer.unknown_id]
        lost = [name for name, ids in zip(names, tokenizer.encode_batch(names), strict=True)
                if not ids or tokenizer.unknown_id in ids or (self._dropped and self._dropped(name))]
        lost.sort(key=len, reverse=True)
        self._spelt = re.compile(b"|".join(re.escape(name.encode()) for name in lost)) if lost else None

    def add(self, losses: Losses, texts: Iterable[bytes], ids_T: np.ndarray) -> None:
        """Add to `losses` those of `texts` (UTF-8), whose ids are `ids_T`."""
        if self._unknown_id is not None:
            losses.unknown_tokens += int(np.count_nonzero(ids_T == self._unknown_id))
        if self._spelt is None and self._dropped is None:
            return
        for text in texts:
            if self._spelt is not None:
                losses.special_tokens_in_text += len(self._spelt.findall(text))
            if self._dropped is not None:
                losses.dropped_characters += self._dropped(text.decode("utf-8"))
