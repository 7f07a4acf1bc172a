"""A run in progress: engine, counters and files; started afresh or from the newest checkpoint.

    1. `start(plan, topology)`   build the trunk, load `latest` if there is one and its history is ours
    2. `Run.save()`              checkpoint with run_state.json
"""

import platform as python_platform
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from megatron_encdec import __version__
from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.optimizer import build_optimizer, wrap
from megatron_encdec.engine.saver import Saver
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_atomic
from megatron_encdec.rundir.lineage import differences, history_hash
from megatron_encdec.training.phases import tokens_per_step
from megatron_encdec.training.plan import Plan, resolved_yaml
from megatron_encdec.training.step import Engine


@dataclass
class Run:
    """What the loop works on. `step` and `targets` count what is done; samples and tokens follow from `step`."""

    plan: Plan
    topology: Topology
    engine: Engine
    directory: Path
    step: int = 0
    targets: int = 0
    saved_step: int | None = None
    saver: Saver | None = None

    @property
    def reports(self) -> bool:
        """Whether this rank writes metrics and speaks."""
        return self.topology.rank == 0

    @property
    def samples(self) -> int:
        """Windows consumed."""
        return self.step * self.plan.config.batch.global_size

    @property
    def tokens(self) -> int:
        """Input tokens consumed."""
        return self.step * tokens_per_step(self.plan.config)

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.directory / "checkpoints"

    def save(self) -> None:
        """Write the checkpoint of the current step, unless that is there already."""
        if self.saved_step == self.step:
            return
        timeline = self.plan.timeline
        history = timeline.history(self.step)
        phase = timeline.at(max(1, self.step))
        if self.saver is None:
            self.saver = Saver(self.checkpoints, self.engine.trunk, self.engine.optimizer,
                               self.plan.config.checkpoint.keep, asynchronous=False)
        self.saver.save({
            "step": self.step, "phase": phase.index, "phase_name": phase.name, "objective": phase.objective.name,
            "samples": self.samples, "tokens": self.tokens, "targets": self.targets,
            "history_hash": history_hash(history), "history": history,
            "data_fingerprints": timeline.fingerprints, "tokenizer_fingerprint": self.plan.tokenizer.fingerprint,
            "topology": self.topology.as_dict(), "versions": versions()},
            always={phase.end for phase in timeline.phases})
        self.saved_step = self.step


def versions() -> dict:
    """Package versions that bit-equality depends on."""
    return {"megatron_encdec": __version__, "torch": torch.__version__, "megatron_core": mcore.__version__,
            "numpy": numpy.__version__, "python": python_platform.python_version()}


def start(plan: Plan, topology: Topology) -> Run:
    """The run of `plan`, where it stands."""
    config = plan.config
    directory = Path(config.run.dir)
    newest = checkpoint.newest(directory / "checkpoints")
    state = None
    if newest is not None:
        state = checkpoint.read_run_state(newest)
        _check_history(plan, state, newest)
    trunk = build_trunk(config.model, topology, plan.dtype, config.data.sequence_length, config.run.seed,
                        config.parallel.sequence)
    ddp = wrap(trunk)
    engine = Engine(ddp, build_optimizer(ddp, config.optimizer), topology, config.batch.micro_size,
                    config.batch.global_size)
    run = Run(plan, topology, engine, directory)
    if state is not None:
        checkpoint.load(newest, trunk, engine.optimizer)
        run.step, run.targets, run.saved_step = state["step"], state["targets"], state["step"]
    if run.reports:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / "config.yaml", resolved_yaml(config))
    return run


def _check_history(plan: Plan, state: dict, newest: Path) -> None:
    step = state["step"]
    if step > plan.timeline.total_steps:
        raise UserError(f"{newest}: the run is at step {step}, the config ends at {plan.timeline.total_steps}; "
                        "raise run.total or use another run.dir")
    history = plan.timeline.history(step)
    if history_hash(history) != state["history_hash"]:
        changed = "; ".join(differences(state["history"], history)[:6])
        raise UserError(f"{newest}: the config changes what determined this state ({changed}); give the past back "
                        "as it was, or train in another run.dir")
