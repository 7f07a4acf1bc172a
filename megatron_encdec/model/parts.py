"""The parameters of a trunk by part and by kind: what an optimizer treats apart, and what a phase freezes.

Names are those of the whole model, whichever pipeline stage holds a parameter; tied embeddings have one name, though
the first and the last stage both hold the table.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_encdec.platform.errors import UserError

_EMBEDDINGS, _HEAD, _LAYERS = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.layers."
_EMBEDDING_NORM, _OF_HEAD = ".embedding_norm.", ("output_layer.", "prediction_head.")


@dataclass(frozen=True)
class Place:
    """A parameter of this rank. name: in the whole model. layer: its number from 0, None outside the layers, where the
    embeddings' norm is, too."""

    name: str
    parameter: torch.nn.Parameter
    layer: int | None

    @property
    def kind(self) -> str:
        """`embeddings` (tied: the head's matrix too), `head` (its output matrix), `biases`, `norms` or `matrices`."""
        if self.name in (_EMBEDDINGS, _HEAD):
            return "head" if self.name == _HEAD else "embeddings"
        if self.name.endswith(".bias"):
            return "biases"
        return "norms" if self.parameter.dim() == 1 else "matrices"

    @property
    def part(self) -> str:
        """`embeddings`, with their norm, `layers`, `norm` (the final one) or `head`."""
        if self.name == _EMBEDDINGS or _EMBEDDING_NORM in self.name:
            return "embeddings"
        if self.name.startswith(_OF_HEAD):
            return "head"
        return "norm" if self.layer is None else "layers"


@dataclass(frozen=True)
class Frozen:
    """What of a trunk stays as it is: the embeddings, layers by their numbers from 0, the head. The final norm goes
    with the last layer; an output matrix that is tied to the embeddings goes with them."""

    embeddings: bool = False
    head: bool = False
    layers: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Frozen":
        """From `[embeddings, layers 0-7, layers 9, head]`; `ValueError` for other words."""
        layers: set[int] = set()
        for word in words:
            if word in ("embeddings", "head"):
                continue
            found = re.fullmatch(r"layers (\d{1,5})(?:-(\d{1,5}))?", word)
            if found is None or found[2] and int(found[2]) < int(found[1]):
                raise ValueError(f"{word!r} is not one of embeddings, head, layers A-B, layers N")
            layers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
        return cls("embeddings" in words, "head" in words, frozenset(layers))

    def __bool__(self) -> bool:
        return self != Frozen()

    @property
    def words(self) -> list[str]:
        """The one way to write it."""
        ranges: list[list[int]] = []
        for layer in sorted(self.layers):
            if ranges and ranges[-1][1] == layer - 1:
                ranges[-1][1] = layer
            else:
                ranges.append([layer, layer])
        layers = [f"layers {first}" + (f"-{last}" if last > first else "") for first, last in ranges]
        return ["embeddings"] * self.embeddings + layers + ["head"] * self.head

    def check(self, num_layers: int, tied: bool, where: str) -> None:
        """Refuse, under the key `where`, what a trunk of so many layers does not have, and to freeze all of it. tied:
        the head is the embeddings' table and nothing else."""
        if beyond := [layer for layer in sorted(self.layers) if layer >= num_layers]:
            raise UserError(f"{where}: there is no layer {beyond[0]}; the trunk has the layers 0-{num_layers - 1}")
        if self.head and tied:
            raise UserError(f"{where}: head: model.tied_embeddings makes the head the embeddings' table; give "
                            "embeddings, which freezes both")
        if self.embeddings and (self.head or tied) and len(self.layers) == num_layers:
            raise UserError(f"{where}: {', '.join(self.words)} is the whole trunk, nothing is left to train; leave a "
                            "part out")

    def holds(self, place: Place, num_layers: int) -> bool:
        """Whether the parameter is frozen."""
        if place.part in ("embeddings", "head"):
            return self.embeddings if place.part == "embeddings" else self.head
        return (num_layers - 1 if place.layer is None else place.layer) in self.layers


def places(trunk: torch.nn.Module) -> Iterator[Place]:
    """Every parameter of this rank's part of `trunk`, in its order."""
    for name, parameter in trunk.named_parameters():
        if name == _HEAD and trunk.model.tied_embeddings:
            name = _EMBEDDINGS
        layer = None
        if name.startswith(_LAYERS):
            number, _, rest = name.removeprefix(_LAYERS).partition(".")
            layer = trunk.decoder.layers[int(number)].layer_number - 1
            name = f"{_LAYERS}{layer}.{rest}"
            layer = None if _EMBEDDING_NORM in name else layer
        yield Place(name, parameter, layer)
