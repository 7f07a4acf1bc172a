"""What objectives know of a tokenizer: which tokens may be masked, and what stands in their place."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """`size` tokens (padding columns left out); `special_ids` are never masked, and the mask counts as one."""

    size: int
    special_ids: frozenset[int] = frozenset()
    mask_id: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """That of `tokenizer`."""
        return cls(tokenizer.vocabulary_size, frozenset(tokenizer.special_ids), tokenizer.mask_id)

    def __post_init__(self):
        special = self.special_ids | ({self.mask_id} - {None})
        object.__setattr__(self, "special_ids", frozenset(special))
        if special and not 0 <= min(special) <= max(special) < self.size:
            raise UserError(f"tokenizer: special token ids {min(special)}..{max(special)} are outside its vocabulary "
                            f"of {self.size}")
        if len(special) == self.size:
            raise UserError(f"tokenizer: all {self.size} tokens are special, none can be masked")

    @cached_property
    def ordinary_V(self) -> np.ndarray:
        """bool [size]: whether a token may be masked."""
        ordinary_V = np.ones(self.size, dtype=bool)
        ordinary_V[list(self.special_ids)] = False
        return ordinary_V

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """int64, ascending: the tokens that may be masked, and drawn in the place of one."""
        return np.flatnonzero(self.ordinary_V)

    @cached_property
    def identity(self) -> dict:
        """What masks depend on besides the objective's settings: part of the history of the phases that mask."""
        ordinary = ",".join(map(str, self.ordinary_ids.tolist()))
        return {"mask_id": self.mask_id, "ordinary_ids": hashlib.sha256(ordinary.encode()).hexdigest()}
