"""A run in progress: engine, counters and files; started afresh or from a checkpoint.

    1. `start(plan, topology, origin)`   build the trunk, load what `origin` names
    2. `Run.save()`                      checkpoint with run_state.json, beside training
"""

import platform as python_platform
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch

from megatron_encdec import __version__
from megatron_encdec.engine import checkpoint
from megatron_encdec.engine.fp8_state import make_fp8_state
from megatron_encdec.engine.optimizer import build_optimizer, wrap
from megatron_encdec.engine.saver import Saver
from megatron_encdec.engine.shards import owned
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.platform.errors import AgreedError, IntegrityError
from megatron_encdec.platform.watchdog import LONG, mark
from megatron_encdec.rundir.lineage import history_hash
from megatron_encdec.training.origin import Origin, changed_keys
from megatron_encdec.training.phases import Phase, tokens_per_step
from megatron_encdec.training.plan import Plan
from megatron_encdec.training.step import Engine, StepResult


@dataclass
class Run:
    """What the loop works on. `step`, `targets` and `skipped` (steps without an update) count what is done;
    samples and tokens follow from `step`."""

    plan: Plan
    topology: Topology
    engine: Engine
    saver: Saver
    origin: Origin
    step: int = 0
    targets: int = 0
    skipped: int = 0
    saved_step: int | None = None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.plan.config.run.dir)

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
    def phase(self) -> Phase:
        """That of the step done last."""
        return self.plan.timeline.at(max(1, self.step))

    @property
    def bytes_to_save(self) -> int:
        """Of this rank's share of a checkpoint."""
        return sum(shard.values.nbytes for shard in owned(self.engine.trunk, self.engine.optimizer))

    def count(self, step: int, result: StepResult) -> None:
        """Step `step` is done."""
        self.step, self.targets = step, self.targets + result.targets
        self.skipped += not result.finite

    def save(self, metrics_position: dict | None, suspect: bool) -> None:
        """Begin the checkpoint of the current step, unless that is there already.

        metrics_position: of metrics.jsonl, known to the rank that writes it. suspect: the last step was skipped, so
        that this state may be the cause: no older checkpoint is deleted for it.
        """
        if self.saved_step == self.step:
            return
        timeline = self.plan.timeline
        history = timeline.history(self.step)
        mark(f"saving step {self.step}", limit=LONG)
        self.saver.save({
            "step": self.step, "phase": self.phase.index, "phase_name": self.phase.name,
            "objective": self.phase.objective.name, "samples": self.samples, "tokens": self.tokens,
            "targets": self.targets, "skipped": self.skipped, "metrics_position": metrics_position,
            "history_hash": history_hash(history), "history": history,
            "data_fingerprints": timeline.fingerprints, "tokenizer_fingerprint": self.plan.tokenizer.fingerprint,
            "topology": self.topology.as_dict(), "versions": versions()},
            always={phase.end for phase in timeline.phases}, delete=not suspect)
        self.saved_step = self.step


def versions() -> dict:
    """Package versions that bit-equality depends on."""
    return {"megatron_encdec": __version__, "torch": torch.__version__, "megatron_core": mcore.__version__,
            "numpy": numpy.__version__, "python": python_platform.python_version()}


def start(plan: Plan, topology: Topology, origin: Origin) -> Run:
    """The run of `plan` with the state that `origin` names; collective."""
    config = plan.config
    mark("building the trunk", limit=LONG)
    performance, precision = config.performance, config.precision
    trunk = build_trunk(config.model, topology, plan.dtype, config.data.sequence_length, config.run.seed,
                        config.parallel.sequence, performance, precision)
    if performance.overlap_tensor:
        mcore.start_tensor_overlap(config.batch.micro_size * config.data.sequence_length, config.model.hidden_size,
                                   topology.tensor, precision.fp8 is not None)
    ddp = wrap(trunk, *(topology.data > 1 and performance.on_gpu(name)
                        for name in ("overlap_gradients", "overlap_parameters")))
    engine = Engine(ddp, build_optimizer(ddp, config.optimizer), topology, config.batch.micro_size,
                    config.batch.global_size, performance.batches_ahead, precision.fp8_evaluation)
    make_fp8_state(trunk)
    if origin.checkpoint is not None:
        mark(f"loading {origin.checkpoint}", limit=LONG)
        _load(origin, trunk, engine.optimizer)
    saver = Saver(Path(config.run.dir) / "checkpoints", trunk, engine.optimizer, config.checkpoint.keep,
                  config.checkpoint.async_)
    run = Run(plan, topology, engine, saver, origin)
    if origin.kind in ("resume", "fork"):
        state = origin.state
        run.step, run.targets, run.skipped = state["step"], state["targets"], state.get("skipped", 0)
        run.saved_step = run.step
        if "precision" in state["history"]:
            plan.timeline.adopt_precision(state["history"]["precision"], run.step)
        now = {"topology": topology.as_dict(), "versions": versions()}
        run.origin = replace(origin, changed=origin.changed | changed_keys(
            {name: state.get(name) for name in now}, now))
    return run


def _load(origin: Origin, trunk, optimizer) -> None:
    """Fill trunk and optimizer; weights alone leave the optimizer as new, its fp32 masters the other run's."""
    load = checkpoint.load_weights if origin.kind == "weights" else checkpoint.load
    try:
        load(origin.checkpoint, trunk, optimizer)
    except IntegrityError as error:
        raise AgreedError(str(error)) from None  # checked by all ranks together
