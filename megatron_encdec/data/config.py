"""The `data:` section of the config: which token files, in which proportions, cut into which windows."""

from dataclasses import dataclass, fields, replace
from math import isfinite

from megatron_encdec.platform.schema import ANY_TIME, SAME_CONTENT, at_least, key


@dataclass
class SourceConfig:
    """One source of windows."""

    path: str = key("the PREFIX of PREFIX.bin and PREFIX.idx, as `preprocess --output` had it", later=SAME_CONTENT)
    weight: float = key("share of the samples relative to the other sources of the list; not a number of epochs", 1.0)

    def __post_init__(self):
        if not self.path:
            raise ValueError("path: empty; give the prefix of a .bin/.idx pair")
        if self.path.endswith((".bin", ".idx")):
            raise ValueError(f"path: {self.path!r} is one file of the pair; give their prefix {self.path[:-4]!r}")
        if not (isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight: must be a number above 0, found {self.weight}; "
                             "leave a source out of the list to not use it")


@dataclass
class RandomLength:
    """Cut each window into segments with lengths i.i.d. uniform on [min, max] tokens."""

    min: int = key("tokens of the shortest segment")
    max: int = key("tokens of the longest segment; at most `sequence_length`")

    def __post_init__(self):
        at_least(self, 1, "min")
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is above max ({self.max})")


@dataclass
class DataConfig:
    """What the run reads: sources of tokens, cut into windows. Lengths are in tokens."""

    train: list[SourceConfig] = key("sources to train on, mixed by their weights")
    validation: list[SourceConfig] = key("sources to measure the validation losses on; none: no validation",
                                         factory=list, later=ANY_TIME)
    seed: int = key("of the order of the windows and of the masks", 1234)
    sequence_length: int = key("tokens of a window, the unit of batches", 2048)
    isolate_documents: bool = key("keep attention, and the targets of CLM, inside a document, where several share a "
                                  "window", True)
    random_length: RandomLength | None = key("cut each window further, into segments of random length that do not see "
                                             "each other; null: no cuts", None)

    def __post_init__(self):
        if not self.train:
            raise ValueError("train: empty; give at least one source, e.g. [{path: PREFIX}]")
        for name in ("train", "validation"):
            paths = [source.path for source in getattr(self, name)]
            for i, path in enumerate(paths):
                if path in paths[:i]:
                    raise ValueError(f"{name}.{i}.path: {path!r} is already source {paths.index(path)}; "
                                     "give it once, with the sum of the weights")
        at_least(self, 0, "seed")
        at_least(self, 2, "sequence_length")
        if self.random_length and self.random_length.max > self.sequence_length:
            raise ValueError(f"random_length.max: {self.random_length.max} is above "
                             f"sequence_length ({self.sequence_length})")


@dataclass(frozen=True)
class DataChange:
    """What a phase changes of the data; a key that is left out stays as it was."""

    train: list[SourceConfig] | None = key("the sources from this phase on", None)
    sequence_length: int | None = key("tokens of a window from this phase on", None)
    isolate_documents: bool | None = key("whether documents are kept apart from this phase on", None)
    random_length: RandomLength | bool | None = key("random segments from this phase on; false: no more of them", None)

    def __post_init__(self):
        if self.random_length is True:
            raise ValueError("random_length: true says nothing; give {min, max}, or false for none")

    def applied_to(self, data: DataConfig) -> DataConfig:
        """`data` with the changes. Raises ValueError, as `DataConfig` does."""
        given = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}
        if self.random_length is False:
            given["random_length"] = None
        return replace(data, **given)
