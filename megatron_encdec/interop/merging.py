"""Several models of one shape as one: complete or absent.

    1. `Recipe`        method and weights
    2. `Weights`       what a model's tensors are read through, rows at a time
    3. `blocks(...)`   a tensor of the result, some rows at a time, in fp64 until they are rounded once
    4. `check_same`, `check_shapes`    what differs is refused

merge_runs.py and merge_directories.py read and write.

Mean: sum of w_i x_i. SLERP (Shoemake 1985) of two: sin((1 - t) a) / sin(a) x + sin(t a) / sin(a) y, where a is the
angle between the tensors seen as vectors and t the second weight; of nearly parallel ones, the mean. The tensors are
those of Hugging Face, so that runs and their exports give the same: query, key and value count as three.

Shape suffixes: I models, R rows of a tensor, P its parts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.lineage import changed_keys

BLOCK_BYTES = 32 << 20  # of a tensor that is worked on at a time, in fp64
_PARALLEL = 1e-4  # below this sine two directions are one: the mean differs by less than fp32 can tell


@dataclass(frozen=True)
class Recipe:
    """How models are merged: `weights` add up to 1."""

    method: str
    weights: tuple[float, ...]

    @classmethod
    def of(cls, method: str, weights: Sequence[float] | None, models: int) -> "Recipe":
        """Checked and scaled; None: equal weights. Raises `UserError`."""
        weights = [1.0] * models if weights is None else weights
        if models < 2:
            raise UserError("merge: one model; name two or more, and the directory to make last")
        if len(weights) != models:
            raise UserError(f"--weights: {len(weights)} for {models} models; one a model")
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
            raise UserError(f"--weights {','.join(map(str, weights))}: numbers of at least 0, and not all of them 0")
        if method == "slerp" and models != 2:
            raise UserError(f"--method slerp: between two models, {models} are named; merge them pair by pair, or take "
                            "the mean")
        weights = [weight / max(weights) for weight in weights]  # whose sum is a number, however large they were
        return cls(method, tuple(weight / sum(weights) for weight in weights))

    def as_dict(self) -> dict:
        """For records."""
        return {"method": self.method, "weights": list(self.weights)}

    def told(self, models: Sequence[str]) -> str:
        """For people."""
        return f"{self.method} of " + ", ".join(f"{weight:.6g} x {model}" for weight, model in zip(
            self.weights, models, strict=True))


class Weights(Protocol):
    """The tensors of one model. shapes: by name. parts: of each row of a tensor, which part of it that is counted apart
    (None: all are one)."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` .. `stop` - 1."""

    def parts(self, name: str) -> torch.Tensor | None:
        """[R], whole numbers from 0."""


def dtype_of(sources: Sequence[Weights], name: str) -> torch.dtype:
    """Of the merged tensor: what they all have, fp32 where they differ."""
    dtypes = {source.dtypes[name] for source in sources}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def check_same(name: str, first: str, found: dict, expected: dict) -> None:
    """Refuse the model `name` where what is to be the same is not what it is in the `first`."""
    for key, (there, here) in changed_keys(expected, found).items():
        raise UserError(f"{name}: {key} is {here!r}, {there!r} in {first}; only models of one shape and tokenizer can "
                        "be merged")


def check_shapes(sources: Sequence[Weights], names: Sequence[str]) -> None:
    """Refuse models of other tensors; names: of the models."""
    first = sources[0].shapes
    for source, name in zip(sources[1:], names[1:], strict=True):
        if alone := sorted(first.keys() ^ source.shapes.keys()):
            has, lacks = (names[0], name) if alone[0] in first else (name, names[0])
            raise UserError(f"{lacks}: lacks {alone[0]}, which {has} has; only models of one shape can be merged")
        for tensor, shape in first.items():
            if source.shapes[tensor] != shape:
                raise UserError(f"{name}: {tensor} has the shape {list(source.shapes[tensor])}, {list(shape)} in "
                                f"{names[0]}; only models of one shape can be merged")


def blocks(sources: Sequence[Weights], name: str, recipe: Recipe) -> Iterator[tuple[int, torch.Tensor]]:
    """The merged tensor `name` in its dtype: (number of a row, the rows from there on), in order."""
    shape, dtype = sources[0].shapes[name], dtype_of(sources, name)
    factors_PI = _factors(sources, name, recipe)
    parts_R = sources[0].parts(name)
    for first, last in _ranges(shape):
        factors_RI = factors_PI[parts_R[first:last]] if parts_R is not None else factors_PI.expand(last - first, -1)
        total = torch.zeros(last - first, *shape[1:], dtype=torch.float64)
        for source, factors_R in zip(sources, factors_RI.T, strict=True):
            total += source.rows(name, first, last).double().mul_(factors_R.view(-1, *[1] * (total.dim() - 1)))
        yield first, total.to(dtype)


def _ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // (8 * math.prod(shape[1:])))
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def _factors(sources: Sequence[Weights], name: str, recipe: Recipe) -> torch.Tensor:
    """[P, I] in fp64: what each part of each model is multiplied by."""
    weights_1I = torch.tensor([recipe.weights], dtype=torch.float64)
    parts_R = sources[0].parts(name)
    count = 1 if parts_R is None else int(parts_R.max()) + 1
    if recipe.method == "mean":
        return weights_1I.expand(count, -1)
    products_P3 = torch.zeros(count, 3, dtype=torch.float64)  # x x, y y, x y
    shape = sources[0].shapes[name]
    for first, last in _ranges(shape):
        x, y = (source.rows(name, first, last).double().flatten(1 if len(shape) > 1 else 0) for source in sources)
        rows_R3 = torch.stack([(one * other).view(last - first, -1).sum(dim=1)
                               for one, other in ((x, x), (y, y), (x, y))], dim=1)
        here_R = torch.zeros(last - first, dtype=torch.long) if parts_R is None else parts_R[first:last]
        products_P3.index_add_(0, here_R, rows_R3)
    return torch.stack([_along_the_arc(*part.tolist(), recipe.weights[1]) for part in products_P3])


def _along_the_arc(xx: float, yy: float, xy: float, t: float) -> torch.Tensor:
    """[2]: factors of x and y."""
    angle = math.acos(max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))) if xx * yy > 0 else 0.0
    sine = math.sin(angle)
    pair = (1 - t, t) if sine < _PARALLEL else (math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine)
    return torch.tensor(pair, dtype=torch.float64)
