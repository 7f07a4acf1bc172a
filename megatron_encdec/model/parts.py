"""The parameters of a trunk by part and by kind: what an optimizer treats apart, and what a phase freezes.

Names are those of the whole model, whichever pipeline stage holds a parameter; tied embeddings have one name, though
the first and the last stage both hold the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_EMBEDDINGS, _HEAD, _LAYERS = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.layers."


@dataclass(frozen=True)
class Place:
    """A parameter of this rank. name: in the whole model. layer: its number from 0, None outside the layers."""

    name: str
    parameter: torch.nn.Parameter
    layer: int | None

    @property
    def kind(self) -> str:
        """`embeddings` (tied: the head too), `head`, `biases`, `norms` or `matrices`."""
        if self.name in (_EMBEDDINGS, _HEAD):
            return "head" if self.name == _HEAD else "embeddings"
        if self.name.endswith(".bias"):
            return "biases"
        return "norms" if self.parameter.dim() == 1 else "matrices"


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
        yield Place(name, parameter, layer)
