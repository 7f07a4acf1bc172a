"""Sample i of a run: tokens of one window, and where attention must stop inside it.

    1. `Samples(config)`   open the stores, count windows, set up the order
    2. `sample(i)`         order -> (source, epoch, window) -> tokens_S
    3. segment ends        document ends (isolate_documents) and random cuts (random_length), always S at last

Windows of S = sequence_length tokens tile each source without overlap; a rest shorter than S at a source's
end is not used. Legend: S tokens of a window, E segments of it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_encdec.data.config import DataConfig, RandomLength
from megatron_encdec.data.draws import draws
from megatron_encdec.data.order import Order
from megatron_encdec.data.store import TokenStore
from megatron_encdec.platform.errors import UserError


@dataclass(frozen=True, eq=False)
class Sample:
    """One window and where it came from.

    `tokens_S` int64; `segment_ends_E` int64, ascending, the last is S: segment k is
    tokens_S[segment_ends_E[k-1] : segment_ends_E[k]], attention and CLM targets stay inside it.
    """

    index: int
    source: int
    epoch: int
    window: int
    tokens_S: np.ndarray
    segment_ends_E: np.ndarray


class Samples:
    """Every sample of a run, by number, in any order, for ever (epochs follow one another)."""

    def __init__(self, config: DataConfig, which: Literal["train", "validation"] = "train"):
        """Open the sources of `config.train` or `config.validation`.

        Raises UserError where there is none, one is shorter than a window, two are the same data, or two were
        written with different tokenizers; IntegrityError where files are damaged.
        """
        sources = getattr(config, which)
        if not sources:
            raise UserError(f"data.{which}: empty; give at least one source, e.g. [{{path: PREFIX}}]")
        self.sequence_length, self.seed = config.sequence_length, config.seed
        self._isolate, self._random_length = config.isolate_documents, config.random_length
        self.stores = [TokenStore.open(source.path) for source in sources]
        self.windows = [store.tokens // self.sequence_length for store in self.stores]
        self.fingerprints = [store.fingerprint for store in self.stores]
        self._check(which)
        try:
            weights = [source.weight for source in sources]
            self._order = Order(self.windows, weights, self.seed, self.fingerprints)
        except ValueError as error:
            raise UserError(f"data.{which}: {error}") from None

    @property
    def len_windows(self) -> int:
        """Windows of all sources together: with one source, samples in an epoch."""
        return sum(self.windows)

    @property
    def tokenizer(self) -> dict | None:
        """The manifest's record of the tokenizer that wrote the sources; None without manifests."""
        return next((store.tokenizer for store in self.stores if store.tokenizer), None)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0: a function of the config and the data alone."""
        source, epoch, window = self._order.locate(index)
        store, length = self.stores[source], self.sequence_length
        start = window * length
        ends = [np.array([length])]
        if self._isolate:
            ends.append(store.document_ends(start, length))
        if self._random_length:
            ends.append(random_cuts(self.seed, index, length, self._random_length))
        segment_ends_E = np.unique(np.concatenate(ends)) if len(ends) > 1 else ends[0]
        return Sample(index, source, epoch, window, store.read(start, length), segment_ends_E)

    def _check(self, which: str) -> None:
        first_with_manifest = None
        for k, store in enumerate(self.stores):
            key = f"data.{which}.{k}.path"
            if self.windows[k] == 0:
                raise UserError(f"{key}: {store.prefix} holds {store.tokens} tokens, less than one window of "
                                f"{self.sequence_length}; lower data.sequence_length or give more text")
            twin = self.fingerprints.index(store.fingerprint)
            if twin != k:
                raise UserError(f"{key}: {store.prefix} is the same data as source {twin} "
                                f"({self.stores[twin].prefix}); give it once, with the sum of the weights")
            if store.tokenizer:
                first_with_manifest = first_with_manifest or store
                if store.tokenizer.get("fingerprint") != first_with_manifest.tokenizer.get("fingerprint"):
                    raise UserError(f"{key}: {store.prefix} was written with another tokenizer than "
                                    f"{first_with_manifest.prefix}; preprocess both with the same one")


def random_cuts(seed: int, index: int, length: int, law: RandomLength) -> np.ndarray:
    """Cuts strictly inside a window of `length` tokens (int64, ascending), a function of (seed, index).

    Segment lengths are i.i.d. uniform on [law.min, law.max]; the last is cut at the window's end and, if
    shorter than law.min, joined to the one before.
    """
    words = draws(seed, "length", index, -(-length // law.min))  # enough even if all are law.min long
    lengths = law.min + (words % np.uint64(law.max - law.min + 1)).astype(np.int64)
    cuts = np.cumsum(lengths)
    cuts = cuts[cuts < length]
    if cuts.size and length - cuts[-1] < law.min:
        cuts = cuts[:-1]
    return cuts
