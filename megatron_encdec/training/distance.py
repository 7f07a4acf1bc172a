"""`logging.distance`: how far each part of the trunk has come from the weights that its phase began with.

    1. `begin()`      remember the weights as they are; `recall(...)` reads them where a run goes on inside a phase
    2. `measure()`    part -> |w - w0| / |w0|, over the whole trunk, however ranks share it

The weights are those that the forward pass uses (bf16 in a bf16 run). A second copy of them is kept on the device.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_encdec.engine import checkpoint, loading
from megatron_encdec.model.parts import Place, places
from megatron_encdec.model.trunk import Trunk
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import Config
from megatron_encdec.training.origin import Origin


class Distance:
    """Made on every rank; all methods but `begin` are collective. note: what to say where nothing can be measured."""

    def __init__(self, trunk: Trunk, topology: Topology):
        self._trunk, self._counts, self.note = trunk, topology.data_rank == 0, None
        self._first: list[torch.Tensor] | None = None
        layers = [f"layer {layer}" for layer in range(trunk.model.num_layers)]
        self._parts = ["embeddings", *layers, "norm", *([] if trunk.model.tied_embeddings else ["head"])]

    def begin(self) -> None:
        """A phase begins."""
        self._first, self.note = [place.parameter.detach().clone() for place in places(self._trunk)], None

    def recall(self, config: Config, origin: Origin, phase: str, start: int) -> None:
        """Read the weights of step `start`, at which `phase` began, into the trunk, and remember them; the state that
        the run goes on with has to be loaded after it. At step 0 they are in the trunk, or in `run.from`."""
        folders = [config.run.dir, *([config.run.from_.path] if config.run.from_ and origin.kind != "weights" else [])]
        if start == 0:
            folders = []
            if config.run.from_ and config.run.from_.state == "weights":
                folders, start = [config.run.from_.path], config.run.from_.step
            elif config.run.from_:
                self.note = _unknown(phase, "its parent's first weights are")
                return
        for folder in folders:
            try:
                found: Path = checkpoint.directory_at(folder, start)
            except UserError:
                continue
            loading.load_weights(found, self._trunk)
            self.begin()
            return
        if folders:
            self.note = _unknown(phase, f"checkpoint {start} is")
        else:
            self.begin()

    @torch.no_grad()
    def measure(self) -> dict[str, float] | None:
        """By part; None where the first weights are not known."""
        if self._first is None:
            return None
        sums_2P = torch.zeros(2, len(self._parts), dtype=torch.float64, device=device())
        for place, first in zip(places(self._trunk), self._first, strict=True):
            if self._counts and mcore.counts_once(place.parameter):
                now, part = place.parameter.double(), self._parts.index(_part(place))
                sums_2P[0, part] += (now - first.double()).square().sum()
                sums_2P[1, part] += first.double().square().sum()
        dist.all_reduce(sums_2P)
        moved_P, first_P = sums_2P.sqrt().tolist()
        return {part: moved / first for part, moved, first in zip(self._parts, moved_P, first_P, strict=True)}


def _part(place: Place) -> str:
    if place.layer is not None:
        return f"layer {place.layer}"
    return place.kind if place.kind in ("embeddings", "head") else "norm"


def _unknown(phase: str, what: str) -> str:
    return f"logging.distance: {what} not there, so that of phase {phase} is not known; the next phase has its own"
