"""`logging.distance`: how far each part of the trunk has come from the weights that its phase began with.

    1. `begin()`      remember the weights as they are; `recall(...)` reads them where a run goes on inside a phase
    2. `measure()`    part -> |w - w0| / |w0| (|w| where w0 = 0), over the whole trunk, however ranks share it

The weights are those that the forward pass uses (bf16 in a bf16 run). A second copy of them is kept on the device.
"""

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


class Distance:
    """Made on every rank; all methods but `begin` are collective. note: what to say where nothing can be measured."""

    def __init__(self, trunk: Trunk, topology: Topology):
        self._trunk, self._counts, self.note = trunk, topology.data_rank == 0, None
        self._first: list[torch.Tensor] | None = None
        self._centre = 1.0 - trunk.model.initial_norm  # of a norm, what it multiplies by is measured
        layers = [f"layer {layer}" for layer in range(trunk.model.num_layers)]
        self._parts = ["embeddings", *layers, "norm", *([] if trunk.model.head_is_embeddings else ["head"])]

    def begin(self) -> None:
        """A phase begins."""
        self._first, self.note = [place.parameter.detach().clone() for place in places(self._trunk)], None

    def recall(self, config: Config, beginning: dict, phase: str, start: int) -> None:
        """Read the weights of step `start`, at which `phase` began, into the trunk, and remember them; the state that
        the run goes on with has to be loaded after it. beginning: what the state at step 0 follows from
        (`Timeline.beginning`); the weights of a seed are in the trunk already."""
        if start == 0 and "weights" not in beginning:
            self.begin()
            return
        origin, runs = config.run.from_, [(config.run.dir, start)] if start else []
        if origin and (origin.state == "weights") == (start == 0):
            runs.append((origin.path, start or origin.step))
        for run, step in runs:
            try:
                found = checkpoint.directory_at(run, step)
            except UserError:
                continue
            loading.load_weights(found, self._trunk)
            self.begin()
            return
        self.note = (f"logging.distance: the weights that phase {phase} began with (step {start}) are not there, so "
                     "its distance is not known; the next phase has its own")

    @torch.no_grad()
    def measure(self) -> dict[str, float] | None:
        """By part; None where the first weights are not known."""
        if self._first is None:
            return None
        sums_2P = torch.zeros(2, len(self._parts), dtype=torch.float64, device=device())
        for place, first in zip(places(self._trunk), self._first, strict=True):
            if self._counts and mcore.counts_once(place.parameter):
                part, one = self._parts.index(_part(place)), self._centre if place.kind == "norms" else 0.0
                sums_2P[0, part] += (place.parameter.double() - first.double()).square().sum()
                sums_2P[1, part] += (first.double() + one).square().sum()
        dist.all_reduce(sums_2P)
        moved_P, first_P = sums_2P.sqrt().tolist()
        return {part: moved / (first or 1.0) for part, moved, first in zip(self._parts, moved_P, first_P, strict=True)}


def _part(place: Place) -> str:
    return f"layer {place.layer}" if place.part == "layers" else place.part

