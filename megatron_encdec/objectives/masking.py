"""What objectives that mask have in common: which positions of a window are hidden, and what stands there instead.

    1. Draw three uniforms a position from the counter-based stream of (data.seed, sample number):
       chosen?, how hidden?, which random token?
    2. Choose ordinary tokens: each with the probability `mask_ratio` (see below).
    3. Hide a chosen token: mask token, random token, or as it is, by the second uniform.

Which are chosen, by `unit`:

    token   where the first uniform is below `mask_ratio`: i.i.d., so their number varies (arXiv 2507.00994)
    word    whole words, each by the uniform of its first token. Words are the tokenizer's: a token that starts one, or
            the first of a segment, or one after a special token, begins a word. (Whole-word masking: BERT's release of
            May 2019; github.com/google-research/bert.)
    span    a span starts at each position, of whatever kind, where the first uniform is below p; its length is
            geometric of mean m = `mean_span`, from a stream of its own, not longer than the window, and it goes on at
            the window's start where that ends. Spans may overlap. A position is in none with the probability
            prod over k = 0 .. S - 1 of 1 - p (1 - 1/m)^k, and p is such that this is 1 - `mask_ratio`. (Spans of
            geometric length: SpanBERT, arXiv 1907.10529, section 3.1, which draws them up to a budget instead.)

Always the same draws in the same order: what is chosen at ratio 0.2 is also chosen at 0.4, and runs that differ in
ratio or in the way of hiding are paired position by position. Special tokens are never hidden. How a token is hidden
is drawn for each by itself, whatever the unit. The 80/10/10 split is that of BERT (arXiv 1810.04805, section 3.1).

Legend: S tokens of a window, N hidden ones.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from megatron_encdec.data.draws import uniforms
from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Labelled, Objective, Vocabulary
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import key

MEAN_SPAN = 3.0
_LATER = {"unit": "token", "mean_span": None}  # settings that came later, and their defaults


def check_ratio(key: str, ratio: float) -> None:
    """For `__post_init__`: raises where `ratio` is no share between none and all."""
    if not 0 < ratio < 1:
        raise ValueError(f"{key}: must be above 0 and below 1, found {ratio}")


@dataclass(frozen=True)
class Ramp:
    """A ratio that changes linearly over a phase."""

    from_: float = key("the ratio of the phase's first step", name="from")
    to: float = key("the ratio of its last step")

    def __post_init__(self):
        check_ratio("from", self.from_)
        check_ratio("to", self.to)

    def at(self, step: int, steps: int) -> float:
        """That of update `step` (from 1) of `steps`."""
        done = min(1.0, (step - 1) / (steps - 1)) if steps > 1 else 0.0
        return self.from_ * (1 - done) + self.to * done


@dataclass(frozen=True)
class Masking(Objective):
    """Some ordinary tokens are chosen, hidden and predicted. BERT's way: mask_fraction 0.8, random_fraction 0.1."""

    hides: ClassVar[bool] = True
    short: ClassVar[str | None] = "mask_ratio"

    mask_ratio: float | Ramp = key("share of the ordinary tokens to predict, above 0 and below 1; `{from, to}`: it "
                                   "changes over the phase", 0.4)
    mask_fraction: float = key("share of these that become the mask token", 1.0)
    random_fraction: float = key("share of these that become a random token; the rest stay as they are", 0.0)
    unit: Literal["token", "word", "span"] = key("what is chosen as a whole", "token")
    mean_span: float | None = key("of `unit: span`: tokens of a span, on average; null: 3", None)

    def __post_init__(self):
        if not isinstance(self.mask_ratio, Ramp):
            check_ratio("mask_ratio", self.mask_ratio)
        for name in ("mask_fraction", "random_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be from 0 to 1, found {getattr(self, name)}")
        if self.mask_fraction + self.random_fraction > 1 + 1e-9:
            raise ValueError(f"random_fraction: with mask_fraction {self.mask_fraction} at most "
                             f"{1 - self.mask_fraction:.4g} remains, found {self.random_fraction}")
        if self.unit == "span" and self.mean_span is None:
            object.__setattr__(self, "mean_span", MEAN_SPAN)
        if self.unit != "span" and self.mean_span is not None:
            raise ValueError(f"mean_span: only spans have it, and unit is {self.unit}; leave it out, or set unit: span")
        if self.mean_span is not None and not 1 <= self.mean_span < math.inf:
            raise ValueError(f"mean_span: must be at least 1, found {self.mean_span}")

    @property
    def by_words(self) -> bool:
        return self.unit == "word"

    def at(self, step: int, steps: int) -> "Masking":
        """With the ratio of that update."""
        return replace(self, mask_ratio=self.mask_ratio.at(step, steps)) if self._ramps else self

    def check(self, vocabulary: Vocabulary, where: str) -> None:
        if self.by_words and not vocabulary.word_start_ids:
            raise UserError(f"{where}.unit: word, but this tokenizer has no word starts (no blank before words, no ## "
                            "inside them); take unit: token or span, or another tokenizer")

    def to_yaml(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_yaml().items() if key not in _LATER or value != _LATER[key]}

    def progress(self, done: int, steps: int) -> dict[str, int]:
        """A ramp's ratios follow from both."""
        return {"done": done, "steps": steps} if self._ramps else {}

    @property
    def _ramps(self) -> bool:
        return isinstance(self.mask_ratio, Ramp)

    def label(self) -> str:
        """`mlm:0.4`, `mlm:0.3->0.05`; with BERT's way of hiding `mlm:0.15 (mask 0.8, random 0.1)`, with other units
        `mlm:0.4 (word)`, `mlm:0.4 (span 3)`."""
        ratio = f"{self.mask_ratio.from_:g}->{self.mask_ratio.to:g}" if self._ramps else f"{self.mask_ratio:g}"
        notes = [] if self.unit == "token" else [self.unit + (f" {self.mean_span:g}" if self.mean_span else "")]
        if self.mask_fraction != 1.0:
            notes += [f"mask {self.mask_fraction:g}", f"random {self.random_fraction:g}"]
        return f"{self.name}:{ratio}" + (f" ({', '.join(notes)})" if notes else "")

    def short_name(self) -> str:
        """`mlm40`, `mlm30to5`, `mlm40word`, `mlm40span3`."""
        ends = [self.mask_ratio.from_, self.mask_ratio.to] if self._ramps else [self.mask_ratio]
        unit = "" if self.unit == "token" else self.unit + (f"{self.mean_span:g}" if self.mean_span else "")
        return f"{self.name}{'to'.join(f'{100 * end:g}' for end in ends)}{unit}"

    def apply(self, sample: Sample, data_seed: int, vocabulary: Vocabulary) -> Labelled:
        """Labels of the hidden tokens only: none where the window holds special tokens alone."""
        tokens_S = sample.tokens_S
        chosen_S, how_S, which_S = uniforms(data_seed, "mask", sample.index, 3 * len(tokens_S)).reshape(3, -1)
        maskable_S = self.maskable(sample, vocabulary)
        if self.unit == "token":
            found_S = chosen_S < self.mask_ratio
        elif self.unit == "word":
            first_S = first_of_word(sample, vocabulary)
            found_S = ((chosen_S < self.mask_ratio) & maskable_S)[first_S]  # a word goes as its first token does
        else:
            found_S = in_spans(chosen_S, uniforms(data_seed, "span", sample.index, len(tokens_S)), self.mask_ratio,
                               self.mean_span)
        hidden_N = np.flatnonzero(found_S & maskable_S)
        labels_N = tokens_S[hidden_N]
        inputs_S = tokens_S.copy()
        inputs_S[hidden_N] = self._hide(labels_N, how_S[hidden_N], which_S[hidden_N], vocabulary)
        return Labelled(inputs_S, hidden_N - self.predicts, labels_N)

    def maskable(self, sample: Sample, vocabulary: Vocabulary) -> np.ndarray:
        """bool [S]: which positions may be hidden."""
        return ordinary(sample, vocabulary)

    def _hide(self, labels_N: np.ndarray, how_N: np.ndarray, which_N: np.ndarray,
              vocabulary: Vocabulary) -> np.ndarray:
        if self.mask_fraction == 1.0:
            return np.full_like(labels_N, vocabulary.mask_id)
        ordinary_ids = vocabulary.ordinary_ids
        random_N = ordinary_ids[(which_N * len(ordinary_ids)).astype(np.int64)]
        unmasked_N = np.where(how_N < self.mask_fraction + self.random_fraction, random_N, labels_N)
        return np.where(how_N < self.mask_fraction, vocabulary.mask_id, unmasked_N)


def ordinary(sample: Sample, vocabulary: Vocabulary) -> np.ndarray:
    """bool [S]: which positions hold a token that is not special."""
    try:
        return vocabulary.ordinary_V[sample.tokens_S]
    except IndexError:
        raise UserError(f"sample {sample.index} holds token id {sample.tokens_S.max()}, outside the tokenizer's "
                        f"vocabulary of {vocabulary.size}: the data was written with another tokenizer") from None


def starts_of_segments(sample: Sample) -> np.ndarray:
    """int64, ascending: the first position of each segment."""
    return np.concatenate(([0], sample.segment_ends_E[:-1]))


def first_of_word(sample: Sample, vocabulary: Vocabulary) -> np.ndarray:
    """int64 [S]: where the word of each position starts; a special token is a word by itself."""
    special_S = ~ordinary(sample, vocabulary)
    starts_S = vocabulary.word_starts_V[sample.tokens_S] | special_S
    starts_S[1:] |= special_S[:-1]
    starts_S[starts_of_segments(sample)] = True
    return np.maximum.accumulate(np.where(starts_S, np.arange(len(starts_S)), 0))


def in_spans(start_S: np.ndarray, length_S: np.ndarray, ratio: float, mean: float) -> np.ndarray:
    """bool [S]: which positions lie in a span, each with the probability `ratio`. start_S, length_S: uniforms, one a
    position, that say whether a span starts there, and how long it is."""
    size = len(start_S)
    probability, beyond = _law_of_spans(size, ratio, mean)
    starts = np.flatnonzero(start_S < probability)
    ends = starts + 1 + np.searchsorted(-beyond, -length_S[starts], side="left")
    change = np.bincount(starts, minlength=2 * size + 1) - np.bincount(ends, minlength=2 * size + 1)
    open_2S = np.cumsum(change)[:2 * size].reshape(2, size)  # the second row: what goes on at the window's start
    return open_2S.sum(axis=0) > 0


@lru_cache(maxsize=64)
def _law_of_spans(size: int, ratio: float, mean: float) -> tuple[float, np.ndarray]:
    """(probability that a span starts at a position, [size - 1] that one is longer than 1, 2, ..., size - 1)."""
    longer = np.cumprod(np.full(size, 1 - 1 / mean))
    reach = np.concatenate(([1.0], longer[:-1]))  # that a span reaches k positions ahead, k = 0 .. size - 1
    low, high = 0.0, ratio
    while low < (middle := (low + high) / 2) < high:
        if 1 - np.prod(1 - middle * reach) < ratio:
            low = middle
        else:
            high = middle
    return high, longer[:-1]
