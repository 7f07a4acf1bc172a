"""Sample i of a run: tokens of one window, and where attention must stop inside it.

    1. `Samples(config)`   open the stores, count windows, set up the order
    2. `sample(i)`         order -> (source, epoch, window) -> tokens_S, and where its segments end

Windows of S = sequence_length tokens tile each source without overlap; a rest shorter than S at a source's
end is not used. Legend: S tokens of a window, E segments of it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_encdec.data.config import DataConfig, RandomLength
from megatron_encdec.data.draws import draws
from megatron_encdec.data.order import Order
from megatron_encdec.data.store import AbsentStore, TokenStore
from megatron_encdec.platform.errors import WARNING, UserError

EPOCHS_WITHOUT_NOTE = 4  # up to there repeated text is nearly as good as new (Muennighoff et al., NeurIPS 2023)
EPOCHS_WITHOUT_WARNING = 10  # beyond, it is probably a mistake: a budget for more text than there is


@dataclass(frozen=True, eq=False)
class Sample:
    """One window and where it came from. `tokens_S` int64; `segment_ends_E` int64, ascending, the last is S: segment k
    is tokens_S[segment_ends_E[k-1] : segment_ends_E[k]], attention and CLM targets stay inside it. Segments end where
    documents do (isolate_documents), at random cuts (random_length), and at S."""

    index: int
    source: int
    epoch: int
    window: int
    tokens_S: np.ndarray
    segment_ends_E: np.ndarray


class Samples:
    """Every sample that one declaration of the data gives, by number, in any order, for ever (epochs follow one
    another)."""

    def __init__(self, config: DataConfig, which: Literal["train", "validation"] = "train", section: str = "data",
                 first: int = 0, read: Mapping[tuple[str, int], int] | None = None,
                 stores: dict[str, TokenStore | AbsentStore] | None = None, key: str | None = None):
        """section: where in the config it stands; key: where its sources do, if elsewhere. first: its first sample,
        before which windows were `read`: (a source's fingerprint, window length) -> how many; a source goes on from
        there. stores: open ones, by path.
        Raises UserError where there is no source, one is shorter than a window, or two are the same data;
        IntegrityError where files are damaged. Whether they are of the run's tokenizer its plan checks."""
        sources, self._key, self._section = getattr(config, which), key or f"{section}.{which}", section
        stores, read = {} if stores is None else stores, read or {}
        if not sources:
            raise UserError(f"{self._key}: empty; give at least one source, e.g. [{{path: PREFIX}}]")
        # Validation has the same seed: its sample i has the mask pattern of training's, on other text. Masks are a
        # function of (data.seed, i) alone, and a pattern by itself tells a model nothing.
        self.sequence_length, self.seed = config.sequence_length, config.seed
        self._isolate, self._random_length = config.isolate_documents, config.random_length
        self._whole = np.array([self.sequence_length])
        self.stores = [stores.get(one.path) or stores.setdefault(one.path, TokenStore(one.path)) for one in sources]
        self.windows = [store.tokens // self.sequence_length for store in self.stores]
        self.fingerprints = [store.fingerprint for store in self.stores]
        self._check()
        try:
            self._order = Order(
                self.windows, [source.weight for source in sources], self.seed, self.fingerprints, first,
                [read.get((fingerprint, self.sequence_length), 0) for fingerprint in self.fingerprints])
        except ValueError as error:
            raise UserError(f"{self._key}: {error}") from None

    @property
    def len_windows(self) -> int:
        """Windows of all sources together: with one source, samples in an epoch."""
        return sum(self.windows)

    def read(self, end: int) -> list[int]:
        """How many windows of each source, in this length, all samples of the run before number `end` have read."""
        return self._order.read(end)

    def epochs(self, end: int) -> list[float]:
        """How often each source is read, on average over its windows, by all samples before number `end`."""
        return [count / windows for count, windows in zip(self.read(end), self.windows, strict=True)]

    def notes(self, end: int, fingerprints: Collection[str] | None = None,
              read: Mapping[tuple[str, int], int] | None = None) -> list[str]:
        """What to say at the start of a run that reads samples before number `end` from here: data without a manifest,
        sources seen too often; if given, of those with these `fingerprints`. read: what was read before of all sources
        and lengths, as above; windows of other lengths are the same text."""
        notes = [store.note for store in self.stores if store.note]
        for k, (store, epochs) in enumerate(zip(self.stores, self.epochs(end), strict=True)):
            others = {length: count for (fingerprint, length), count in (read or {}).items()
                      if fingerprint == store.fingerprint and length != self.sequence_length and count}
            epochs += sum(count / (store.tokens // length) for length, count in others.items())
            if epochs > EPOCHS_WITHOUT_NOTE and (fingerprints is None or store.fingerprint in fingerprints):
                *lengths, longest = (f"{length:,}" for length in sorted({*others, self.sequence_length}))
                what = f"it, in windows of {', '.join(lengths)} and {longest} tokens" if others else \
                    f"its {self.windows[k]:,} windows"
                repeated = f"{self._key}.{k}: {store.prefix} is repeated: {epochs:,.1f} epochs of {what}; beyond "
                notes.append(f"{repeated}{EPOCHS_WITHOUT_NOTE} repeating is worth less than new text (lower its "
                             "weight, or give more of it)" if epochs <= EPOCHS_WITHOUT_WARNING else
                             f"{WARNING}{repeated}{EPOCHS_WITHOUT_WARNING} a model learns it by heart. Make the run "
                             "shorter (run.total, or the length of its phases), or give more text")
        return notes

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0: a function of the config and the data alone."""
        source, epoch, window = self._order.locate(index)
        store, length = self.stores[source], self.sequence_length
        start = window * length
        ends_E = store.document_ends(start, length) if self._isolate else self._whole
        if self._random_length:
            ends_E = np.union1d(ends_E, random_cuts(self.seed, index, length, self._random_length))
        if not ends_E.size or ends_E[-1] != length:
            ends_E = np.concatenate((ends_E, self._whole))
        return Sample(index, source, epoch, window, store.read(start, length), ends_E)

    def _check(self) -> None:
        for k, store in enumerate(self.stores):
            key = f"{self._key}.{k}.path"
            if self.windows[k] == 0:
                raise UserError(f"{key}: {store.prefix} holds {store.tokens} tokens, less than one window of "
                                f"{self.sequence_length}; lower {self._section}.sequence_length or give more text")
            twin = self.fingerprints.index(store.fingerprint)
            if twin != k:
                raise UserError(f"{key}: {store.prefix} is the same data as source {twin} "
                                f"({self.stores[twin].prefix}); give it once, with the sum of the weights")


def random_cuts(seed: int, index: int, length: int, law: RandomLength) -> np.ndarray:
    """Cuts strictly inside a window of `length` tokens (int64, ascending), a function of (seed, index). The last
    segment is cut at the window's end and, if shorter than law.min, joined to the one before."""
    words = draws(seed, "length", index, -(-length // law.min))  # enough even if all are law.min long
    lengths = law.min + (words % np.uint64(law.max - law.min + 1)).astype(np.int64)
    cuts = np.cumsum(lengths)
    cuts = cuts[cuts < length]
    if cuts.size and length - cuts[-1] < law.min:
        cuts = cuts[:-1]
    return cuts
