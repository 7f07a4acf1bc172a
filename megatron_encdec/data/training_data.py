"""The training data of a run whose phases may change it: sources, weights, window length.

    1. `Declaration`            what holds from one sample number on, and which section of the config says it
    2. `TrainingData.sample`    sample number -> the declaration it falls to -> `Samples`

A source that two declarations share at the same window length goes on where the earlier one stopped, whatever the blend
and however many lie between: its windows are numbered over the whole run, so that none is lost and none repeated before
all were read. Nothing is stored for it: how many windows were read up to a change is counted in closed form
(data/order.py). Windows of another length are other windows; what they may repeat `notes` tells.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_encdec.data.config import DataConfig
from megatron_encdec.data.samples import Sample, Samples
from megatron_encdec.data.store import AbsentStore, TokenStore


@dataclass(frozen=True)
class Declaration:
    """`config` holds for the samples `first` .. `end` - 1 of the run; `section` of the config says so, and `key` gives
    the sources (None: that section does)."""

    first: int
    end: int
    config: DataConfig
    section: str
    key: str | None = None


class TrainingData:
    """Every training sample of a run by its number."""

    def __init__(self, declarations: Sequence[Declaration], stores: dict[str, TokenStore | AbsentStore] | None = None):
        """declarations: at least one, each beginning where the one before it ends. stores: open ones, by path. Raises
        as `Samples` does."""
        self._declarations, self._read = list(declarations), []
        stores = {} if stores is None else stores
        read: dict[tuple[str, int], int] = {}  # (fingerprint, window length) -> windows read so far
        self.parts: list[Samples] = []
        for one in declarations:
            part = Samples(one.config, "train", one.section, one.first, read, stores, one.key)
            self._read.append(dict(read))
            read |= {(fingerprint, part.sequence_length): count
                     for fingerprint, count in zip(part.fingerprints, part.read(one.end), strict=True)}
            self.parts.append(part)
        self.stores = list(stores.values())
        self.fingerprints = {path: store.fingerprint for path, store in stores.items()}

    def check_from(self, index: int, step: int) -> None:
        """Raises IntegrityError where a source whose files are gone is read from sample `index` on, in step `step`."""
        for declaration, part in zip(self._declarations, self.parts, strict=True):
            for store in part.stores if declaration.end > index else ():
                if isinstance(store, AbsentStore):
                    raise store.refusal(f"the run reads it from step {step} on")

    def of(self, index: int) -> Samples:
        """What sample `index` is taken from."""
        return self.parts[bisect_right(self._declarations, index, key=lambda one: one.first) - 1]

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0; those beyond the run's end follow its last declaration."""
        return self.of(index).sample(index)

    def notes(self) -> list[str]:
        """What to say at the start of a run: of each source, where it is last used, whether it is repeated too often;
        and what windows of another length read again."""
        last = {fingerprint: number for number, part in enumerate(self.parts) for fingerprint in part.fingerprints}
        notes = []
        for number, (declaration, part) in enumerate(zip(self._declarations, self.parts, strict=True)):
            ending = [one for one in part.fingerprints if last[one] == number]
            notes += part.notes(declaration.end, ending, self._read[number]) + self._read_again(number)
        return list(dict.fromkeys(notes))

    def _read_again(self, number: int) -> list[str]:
        """A line for each source whose text declaration `number` takes from after windows of another length did."""
        part, section, notes = self.parts[number], self._declarations[number].section, []
        length = part.sequence_length
        for store, windows, end in zip(part.stores, part.windows, part.read(self._declarations[number].end),
                                       strict=True):
            before = {other: count for (fingerprint, other), count in self._read[number].items()
                      if fingerprint == store.fingerprint}
            begin, new = before.pop(length, 0), 1.0  # the orders of two lengths have nothing to do with each other
            for other, count in before.items():
                new *= 1 - min(1.0, count * other / store.tokens)
            tokens, first_time = (end - begin) * length, (min(end, windows) - min(begin, windows)) * length
            if new < 1 and tokens:
                takes = f"go on in {store.prefix}" if begin else f"begin {store.prefix} anew"
                notes.append(f"{section}: windows of {length:,} tokens {takes}: {1 - new:.1%} of it was read in "
                             f"windows of another length, so about {tokens - new * first_time:,.0f} of the "
                             f"{tokens:,} tokens taken from it are read again")
        return notes
