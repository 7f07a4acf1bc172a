"""A checkpoint as a whole trunk: fp32, torch layers, one process, whatever topology and precision wrote it.

    1. `find(run)`             RUN_DIR[@STEP] -> checkpoint, config, run_state.json, tokenizer
    2. `whole_trunk(source)`   the trunk with the checkpoint's weights

A bf16 run rounds its weights from fp32 masters in the optimizer: the masters are what is loaded, so that
nothing is lost, and rounding them gives the bf16 weights that the run computed with.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_encdec.engine import checkpoint, loading
from megatron_encdec.engine.boxes import STATE_PREFIX
from megatron_encdec.engine.checkpoint import RunState, read_run_state
from megatron_encdec.engine.storage import stored_dtypes
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.trunk import Trunk, transformer_config
from megatron_encdec.platform import distributed, schema
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer, load_tokenizer
from megatron_encdec.training.config import Config, load_config
from megatron_encdec.training.layout import lay_out
from megatron_encdec.training.stretches import Stretch


@dataclass(frozen=True)
class Source:
    """A checkpoint and what its run says of it."""

    checkpoint: Path
    config: Config
    state: RunState
    tokenizer: Tokenizer | None  # None: an import that had none

    @property
    def run(self) -> Path:
        return self.checkpoint.parent.parent

    @property
    def done(self) -> list[Stretch]:
        """The run's stretches up to the checkpoint; the last may reach beyond it. None of an import or a merge."""
        return [] if self.state.is_beginning else [one for one in lay_out(self.config) if one.start < self.state.step]

    @property
    def model(self) -> ModelConfig:
        """The trunk, with the rotary embedding of the checkpoint's phase."""
        rope = self.done[-1].rope if self.done else None
        return self.config.model if rope is None else replace(
            self.config.model, rope_theta=rope.theta, rope_scaling=rope.scaling, local_rope_theta=rope.local_theta)

    @property
    def sequence_length(self) -> int:
        """Of the longest windows it was trained on."""
        return max((one.data.sequence_length for one in self.done), default=self.config.data.sequence_length)

    @property
    def imported(self) -> dict | None:
        """What an import noted of its source, if this checkpoint is of one."""
        return self.state.imported

    @property
    def has_masters(self) -> bool:
        """Whether the weights to take are the optimizer's."""
        return any(name.startswith(f"{STATE_PREFIX}.param.") for name in stored_dtypes(self.checkpoint))


def find(run: str) -> Source:
    """What `RUN_DIR[@STEP]` means, without a step the newest checkpoint. Raises `UserError` where there is none, or
    where the run's tokenizer is not the one that it was trained with."""
    found = checkpoint.directory_of(run)
    state = read_run_state(found)
    path = found.parent.parent / "config.yaml"
    config = _of_beginning(path) if state.is_beginning else load_config(path)
    return Source(found, config, state, _tokenizer(found, config, state))


def _of_beginning(path: Path) -> Config:
    """The config of an import or a merge, which leaves data and phases to whoever trains on from it."""
    content = schema.load_yaml(path)
    content.setdefault("phases", [{"name": "none", "objective": "clm", "steps": 1}])
    content["data"] = {"train": [{"path": "none"}], **content.get("data", {})}
    config = schema.build(Config, content)
    beside = path.parent / "tokenizer"
    if beside.is_dir():  # also where the run directory was moved
        config = replace(config, tokenizer=replace(config.tokenizer, path=str(beside)))
    return config


def _tokenizer(found: Path, config: Config, state: RunState) -> Tokenizer | None:
    settings, where = config.tokenizer, found.parent.parent / "config.yaml"
    if state.tokenizer_fingerprint is None:
        return None
    if not Path(settings.path).exists():
        raise UserError(f"{where}: its tokenizer.path {settings.path} is not there; paths in a config are "
                        "relative to where pretrain ran: export from there, or bring the tokenizer back")
    tokenizer = load_tokenizer(settings.path, settings.mask_token, settings.eod_token)
    if not tokenizer.has_fingerprint(state.tokenizer_fingerprint):
        raise UserError(f"{where}: its tokenizer.path {settings.path} is not the tokenizer of {found.name} "
                        f"any more (fingerprint {tokenizer.fingerprint[:12]}, trained with "
                        f"{state.tokenizer_fingerprint[:12]}); put the old file back")
    return tokenizer


def parent_of(source: Source) -> RunState | None:
    """run_state.json of the checkpoint whose weights the run began with; None where it is not there any more."""
    origin = source.config.run.from_
    if origin is None or origin.step is None:
        return None
    try:
        return read_run_state(checkpoint.directory_at(origin.path, origin.step))
    except UserError:
        return None


@contextlib.contextmanager
def groups() -> Iterator[None]:
    """Process groups of the ranks there are: those that stand, or new ones for as long as the context lasts."""
    if mcore.parallel_state.model_parallel_is_initialized():
        yield
        return
    try:
        distributed.initialize()
        yield
    finally:
        distributed.shutdown()


@contextlib.contextmanager
def one_rank() -> Iterator[distributed.Topology]:
    """A topology of one rank, in `groups`."""
    with groups():
        if dist.get_world_size() > 1:
            raise UserError(f"a whole trunk needs one process; this one is one of {dist.get_world_size()} ranks")
        yield distributed.Topology(1, 0, 1, 1, 1, 0, 0, 0)


@contextlib.contextmanager
def whole_trunk(source: Source) -> Iterator[Trunk]:
    """The trunk of `source` in evaluation mode; its process groups last as long as the context."""
    model = source.model
    with one_rank() as topology:
        settings = transformer_config(model, topology, torch.float32, sequence_parallel=False)
        trunk = Trunk(model, settings, "torch", topology, source.sequence_length).to(device())
        loading.load_weights(source.checkpoint, trunk)
        yield trunk.eval()
