"""Which window is sample i? Answered in closed form, so that no shuffled index is built, stored or resumed.

    1. `Mixture.locate(i)`    sample i -> (source, how many earlier samples came from that source)
    2. `Order.locate(i)`      sample i -> (source, epoch, window); each epoch of each source has a shuffle of its own

The weights cut the circle [0, 2**32) into one arc per source. Sample i stands at slot
u_i = (i * STEP + offset) mod 2**32 with STEP / 2**32 near the golden ratio's inverse, whose multiples are spread as
evenly as any: every prefix of the run holds each source in its proportion, up to a few samples. How many earlier
samples fell on an arc is a sum of floors, found exactly in O(log) as by Euclid's algorithm.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from megatron_encdec.data.draws import hash64, permute

CIRCLE = 2**32
STEP = 2654435769  # odd, nearest to 2**32 / golden ratio


def floor_sum(count: int, modulus: int, step: int, offset: int) -> int:
    """Sum of floor((step * j + offset) / modulus) over j in [0, count), exact, in O(log). It counts lattice points
    under a line. Whole multiples of the modulus are taken out; what remains is counted from the other axis, where step
    and modulus have changed places, as in Euclid's algorithm."""
    total = 0
    for below, whole, rest in _quotients(modulus, step):
        if not count:
            break
        total += whole * (count * (count - 1) // 2)
        if offset >= below:
            whole, offset = divmod(offset, below)
            total += whole * count
        count, offset = divmod(rest * count + offset, below)
    return total


@lru_cache(maxsize=64)
def _quotients(modulus: int, step: int) -> tuple[tuple[int, int, int], ...]:
    """Euclid's algorithm on (step, modulus): (modulus, quotient, remainder) line by line, down to a modulus of 0."""
    lines = []
    while modulus:
        whole, rest = divmod(step, modulus)
        lines.append((modulus, whole, rest))
        modulus, step = rest, modulus
    return tuple(lines)


def quantise(weights: Sequence[float], total: int = CIRCLE) -> list[int]:
    """Whole shares of `total` in proportion to `weights` by largest remainder: sum exact, each at least 1."""
    exact = [Fraction(weight) for weight in weights]
    if not exact or min(exact) <= 0:
        raise ValueError("weights: must all be above 0")
    ideal = [weight * total / sum(exact) for weight in exact]
    shares = [int(share) for share in ideal]
    by_remainder = sorted(range(len(shares)), key=lambda k: (shares[k] - ideal[k], k))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    if min(shares) == 0:
        raise ValueError(f"weights: {min(weights)} is less than one part in {total} of their sum")
    return shares


class Mixture:
    """The source of each sample, with no state: shares of every prefix follow the weights."""

    def __init__(self, weights: Sequence[float], seed: int):
        """`weights` > 0 in any scale; `seed` turns the circle."""
        self._starts = [0, *accumulate(quantise(weights))]
        self._offset = hash64(seed, "mixture") % CIRCLE

    def locate(self, index: int) -> tuple[int, int]:
        """(source of sample `index`, number of samples before it that came from that source)."""
        if len(self._starts) == 2:
            return 0, index
        slot = (index * STEP + self._offset) % CIRCLE
        source = bisect_right(self._starts, slot) - 1
        return source, self.count(index, source)

    def count(self, index: int, source: int) -> int:
        """How many of samples 0..index-1 come from `source`."""
        low, high = self._starts[source], self._starts[source + 1]
        # [u mod M >= a] = floor((u + M - a) / M) - floor(u / M), so an arc is a difference of two floor sums
        at_least_low = floor_sum(index, CIRCLE, STEP, self._offset + CIRCLE - low)
        at_least_high = floor_sum(index, CIRCLE, STEP, self._offset + CIRCLE - high)
        return at_least_low - at_least_high


class Order:
    """The order of the samples of a run from one declaration of its data, number `first` and later ones."""

    def __init__(self, windows: Sequence[int], weights: Sequence[float], seed: int,
                 fingerprints: Sequence[str] | None = None, first: int = 0, read: Sequence[int] | None = None):
        """`windows` of each source; with `fingerprints` (all different) a source is known by its data, wherever it
        stands in the list and under whatever path, otherwise by its place. read: of each source, how many of its
        windows the samples before `first` have read, in whatever blend; it goes on from there."""
        names = list(fingerprints) if fingerprints is not None else [f"{k:08d}" for k in range(len(windows))]
        if not len(windows) == len(weights) == len(names) == len(set(names)):
            raise ValueError("windows, weights, fingerprints: one each a source, fingerprints all different")
        if min(windows) < 1:
            raise ValueError("windows: every source needs at least 1")
        self._windows, self._names, self._seed = list(windows), names, seed
        self._sources = sorted(range(len(names)), key=names.__getitem__)
        self._mixture = Mixture([weights[k] for k in self._sources], seed)
        self._before = [(read[k] if read else 0) - self._mixture.count(first, place)
                        for place, k in enumerate(self._sources)]

    def locate(self, index: int) -> tuple[int, int, int]:
        """(source, epoch of that source, window in [0, windows of that source)) of sample `index` >= 0."""
        if index < 0:
            raise ValueError(f"sample {index}: samples are numbered from 0")
        place, count = self._mixture.locate(index)
        source = self._sources[place]
        epoch, position = divmod(self._before[place] + count, self._windows[source])
        key = hash64(self._seed, "epoch", self._names[source], epoch)
        return source, epoch, permute(position, self._windows[source], key)

    def read(self, end: int) -> list[int]:
        """How many windows of each source all samples before number `end` have read."""
        places = [self._sources.index(source) for source in range(len(self._sources))]
        return [self._before[place] + self._mixture.count(end, place) for place in places]
