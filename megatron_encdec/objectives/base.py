"""The contract of an objective: its settings, and a pure function from a sample to what the trunk must predict.

    1. `Vocabulary`        what objectives know of a tokenizer: which tokens may be masked, and what takes their place
    2. `Objective`         what each objective declares and does; a subclass is found by its name in `OBJECTIVES`
    3. `from_yaml`         `phases.N.objective`: a name, `{name: mlm, mask_ratio: 0.4}`, or the short form `mlm:0.4`
    4. `evaluated(...)`    which objectives a run's validation measures
    5. `collate(...)`      several labelled windows as the arrays that one forward pass reads; `filler(...)` for none

Legend: B windows of the micro-batch, S tokens of a window, N labelled positions of all windows (may be 0), E segments
of all windows. A flat position is b * S + s.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer

AttentionKind = Literal["causal", "bidirectional"]
OBJECTIVES: dict[str, type["Objective"]] = {}  # every objective by its name


@dataclass(frozen=True)
class Vocabulary:
    """`size` tokens (padding columns left out); `special_ids` are never masked, and the mask counts as one.
    `word_start_ids`: the tokens that begin a word, None where the tokenizer does not tell."""

    size: int
    special_ids: frozenset[int] = frozenset()
    mask_id: int | None = None
    word_start_ids: frozenset[int] | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        return cls(tokenizer.vocabulary_size, frozenset(tokenizer.special_ids), tokenizer.mask_id,
                   tokenizer.word_start_ids)

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
    def word_starts_V(self) -> np.ndarray:
        """bool [size]: whether a token begins a word."""
        word_starts_V = np.zeros(self.size, dtype=bool)
        word_starts_V[list(self.word_start_ids or ())] = True
        return word_starts_V

    @cached_property
    def identity(self) -> dict:
        """What masks depend on besides the objective's settings: part of the history of the phases that mask."""
        return {"mask_id": self.mask_id, "ordinary_ids": _hash_of(self.ordinary_ids)}

    @cached_property
    def words_identity(self) -> dict:
        """The same of masks that keep to words."""
        return {"word_start_ids": self.word_start_ids and _hash_of(np.flatnonzero(self.word_starts_V))}


def _hash_of(ids: np.ndarray) -> str:
    return hashlib.sha256(",".join(map(str, ids.tolist())).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Labelled:
    """One window, ready for the trunk: S input tokens, N positions with a target (N may be 0).
    `inputs_S` int64; `positions_N` int64, ascending, in [0, S): whose output predicts `labels_N` (int64).
    `weights_N` (float32; None: all 1) multiply the labels' losses; their sum over a global batch is divided by that of
    the windows' `weight` (left out: N)."""

    inputs_S: np.ndarray
    positions_N: np.ndarray
    labels_N: np.ndarray
    weights_N: np.ndarray | None = None
    weight: int | None = None

    def __post_init__(self):
        if self.weight is None:
            object.__setattr__(self, "weight", len(self.labels_N))


@dataclass(frozen=True)
class Objective:
    """An objective with its settings, which are the fields of the subclass; it has no state.

    `attention` travels with each micro-batch and is never set on the model. `predicts`: how far ahead of a labelled
    position its label stands (1: the next token). `hides`: inputs are altered where a label stands, so that the
    tokenizer must have a mask token. `by_words`: masks follow the tokenizer's word starts. `short`: the setting that
    the short form gives. `yardstick`: every run's validation measures it, at its defaults if no phase trains it."""

    name: ClassVar[str]
    attention: ClassVar[AttentionKind]
    predicts: ClassVar[int] = 0
    hides: ClassVar[bool] = False
    by_words: ClassVar[bool] = False
    short: ClassVar[str | None] = None
    yardstick: ClassVar[bool] = False

    def __init_subclass__(cls):
        if "name" in vars(cls):  # else what several objectives share
            OBJECTIVES[cls.name] = cls

    @classmethod
    def attention_of_models(cls) -> AttentionKind:
        """That of the class in which a model that ended with this objective is exported."""
        return cls.attention

    def at(self, step: int, steps: int) -> "Objective":
        """This objective in update `step` (from 1) of a phase of `steps`: one whose settings stand still."""
        return self

    def of_sample(self, data_seed: int, index: int) -> "Objective":
        """What sample `index` is trained for, a function of the arguments alone."""
        return self

    def shares(self) -> list[tuple[float, "Objective"]]:
        """What it is made of, as first trained, with the share of the samples that each has."""
        return [(1.0, self.at(1, 1))]

    def check(self, vocabulary: Vocabulary, where: str) -> None:
        """Raises `UserError`, on the key `where`, if the tokenizer lacks what this needs."""

    def apply(self, sample: Sample, data_seed: int, vocabulary: Vocabulary) -> Labelled:
        """Inputs and targets of `sample`, a function of the arguments alone."""
        raise NotImplementedError

    @classmethod
    def setting_names(cls) -> set[str]:
        return {field.name for field in fields(cls)}

    def settings(self) -> dict[str, Any]:
        return {field.name: schema.to_dict(getattr(self, field.name)) for field in fields(self)}

    def identity(self, vocabulary: Vocabulary, done: int = 0, steps: int = 0) -> dict[str, Any]:
        """What of this determines a state: its part of a run's history, in steps done + 1 .. of a phase of `steps`."""
        return (self.to_yaml() | self.progress(done, steps) | (vocabulary.identity if self.hides else {})
                | (vocabulary.words_identity if self.by_words else {}))

    def progress(self, done: int, steps: int) -> dict[str, int]:
        """What of its place in the phase matters: how much is `done`, of how many `steps`."""
        return {}

    def label(self) -> str:
        """For people: `clm`, `mlm:0.4`."""
        return f"{self.name}:{getattr(self, self.short):g}" if self.short else self.name

    def short_name(self) -> str:
        """In names of models and folders: `clm`, `mlm40` (the setting in per cent)."""
        return f"{self.name}{100 * getattr(self, self.short):g}" if self.short else self.name

    def to_yaml(self) -> dict[str, Any]:
        """Name and settings, as configs and histories have them; one that came later than the others is left out where
        it has its default, so that it changes neither."""
        return {"name": self.name, **self.settings()}

    @classmethod
    def from_yaml(cls, value: Any, where: str) -> "Objective":
        """The objective that the key `where` names; a setting that is null has its default."""
        if isinstance(value, str):
            value = _from_short(value, where)
        known = ", ".join(OBJECTIVES)
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected {known}, mlm:0.4 or a mapping such as {{name: mlm, mask_ratio: 0.4}}, "
                            f"found {value!r}")
        if "name" not in value:
            raise UserError(f"{where}.name: missing; one of {known}")
        kind = OBJECTIVES[schema.one_of(tuple(OBJECTIVES), value["name"], f"{where}.name")]
        settings = {key: item for key, item in value.items() if key != "name" and item is not None}
        for key in settings.keys() - kind.setting_names():
            if owners := [other.name for other in OBJECTIVES.values() if key in other.setting_names()]:
                raise UserError(f"{where}.{key}: is a setting of {', '.join(owners)}; {kind.name} has none such")
        return schema.build(kind, settings, where)


def _from_short(text: str, where: str) -> dict[str, Any]:
    """`mlm:0.4` as a mapping."""
    name, colon, number = (part.strip() for part in text.partition(":"))
    if not colon:
        return {"name": name}
    kind = OBJECTIVES.get(name)
    if kind is not None and kind.short is None:
        others = ", ".join(f"{one.name}:{getattr(one, one.short):g}" for one in OBJECTIVES.values() if one.short)
        raise UserError(f"{where}: {text!r}: {name} takes no number (as {others} do)")
    try:
        return {"name": name, **({kind.short: float(number)} if kind else {})}
    except ValueError:
        raise UserError(f"{where}: {text!r}: after the colon comes a number, {kind.short}, such as mlm:0.4") from None


def of_attention(kind: AttentionKind) -> str:
    """The name of the yardstick with that attention: what a model that came from elsewhere counts as trained for."""
    return next(name for name, one in OBJECTIVES.items() if one.yardstick and one.attention == kind)


def evaluated(trained: Iterable[Objective], has_mask: bool) -> dict[str, Objective]:
    """What validation measures, by name: each objective as it is first trained, and the yardsticks.
    trained: the objectives of the phases, in order. has_mask: whether the tokenizer has a mask token."""
    found: dict[str, Objective] = {}
    for objective in trained:
        for _, part in objective.shares():
            found.setdefault(part.name, part)
    for name, kind in OBJECTIVES.items():
        if kind.yardstick and (has_mask or not kind.hides):
            found.setdefault(name, kind())
    return dict(sorted(found.items()))


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What a micro-batch carries, its attention kind included.

    `inputs_BS`, `label_positions_N` (flat, ascending), `labels_N`: int64. `cu_seqlens` (int32, E + 1): flat
    starts of the segments and the end B * S, as variable-length attention kernels take them. `longest`:
    tokens of the longest segment. `isolated`: some window has more than one segment, so that attention
    needs `cu_seqlens`. `samples`: sample numbers, one a window; windows beyond them are filler. `weights_N` (float32;
    None: all 1) and `weight`: as in `Labelled`."""

    inputs_BS: np.ndarray
    label_positions_N: np.ndarray
    labels_N: np.ndarray
    cu_seqlens: np.ndarray
    longest: int
    isolated: bool
    attention: AttentionKind
    samples: tuple[int, ...]
    weights_N: np.ndarray | None = None
    weight: int | None = None

    def __post_init__(self):
        if self.weight is None:
            object.__setattr__(self, "weight", len(self.labels_N))


def filler(length: int) -> Sample:
    """A window that stands for no sample: it has neither label nor weight."""
    return Sample(-1, -1, -1, -1, np.zeros(length, dtype=np.int64), np.array([length]))


def collate(objective: Objective, samples: Sequence[Sample], data_seed: int, vocabulary: Vocabulary) -> MicroBatch:
    """Apply `objective` to `samples` (at least one, of equal length and attention kind, filler last) and lay them end
    to end."""
    own = [objective.of_sample(data_seed, sample.index) for sample in samples if sample.index >= 0]
    labelled = [one.apply(sample, data_seed, vocabulary) for one, sample in zip(own, samples, strict=False)]
    none = np.zeros(0, dtype=np.int64)
    labelled += [Labelled(sample.tokens_S, none, none) for sample in samples[len(own):]]
    inputs_BS = np.stack([one.inputs_S for one in labelled])
    starts_B = np.arange(len(samples)) * inputs_BS.shape[1]
    ends_E = np.concatenate([start + one.segment_ends_E for start, one in zip(starts_B, samples, strict=True)])
    cu_seqlens = np.concatenate([[0], ends_E]).astype(np.int32)
    return MicroBatch(
        inputs_BS=inputs_BS, labels_N=np.concatenate([one.labels_N for one in labelled]),
        label_positions_N=np.concatenate([start + one.positions_N
                                          for start, one in zip(starts_B, labelled, strict=True)]),
        cu_seqlens=cu_seqlens, longest=int(np.diff(cu_seqlens).max()), isolated=len(ends_E) > len(samples),
        attention=own[0].attention if own else objective.attention,
        samples=tuple(sample.index for sample in samples[:len(own)]), weights_N=_weights(labelled),
        weight=sum(one.weight for one in labelled))


def _weights(labelled: Sequence[Labelled]) -> np.ndarray | None:
    """Those of all labels; None where each is 1."""
    if all(one.weights_N is None for one in labelled):
        return None
    return np.concatenate([np.ones(len(one.labels_N), np.float32) if one.weights_N is None else one.weights_N
                           for one in labelled])
