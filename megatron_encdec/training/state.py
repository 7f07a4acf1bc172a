"""A run in progress: trainer, counters and files; started afresh or from a checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_encdec.engine import loading
from megatron_encdec.engine.boxes import make_fp8_state, owned
from megatron_encdec.engine.checkpoint import RunState, versions
from megatron_encdec.engine.optimizer import build_optimizer, wrap
from megatron_encdec.engine.saver import Saver
from megatron_encdec.model.trunk import Trunk, build_trunk
from megatron_encdec.objectives.base import Objective
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.platform.errors import AgreedError, IntegrityError
from megatron_encdec.platform.watchdog import LONG, mark
from megatron_encdec.rundir.lineage import changed_keys, history_hash
from megatron_encdec.rundir.lock import Claim
from megatron_encdec.training.distance import Distance
from megatron_encdec.training.origin import Origin
from megatron_encdec.training.plan import Plan
from megatron_encdec.training.step import StepResult, Trainer
from megatron_encdec.training.stretches import Stretch


@dataclass
class Run:
    """What the loop works on. The counters are of what is done: steps, windows, input and labelled tokens, skips."""

    plan: Plan
    topology: Topology
    trainer: Trainer
    saver: Saver
    origin: Origin
    step: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    skipped: int = 0
    saved_step: int | None = None
    last_was_skipped: bool = False
    distance: Distance | None = None

    @property
    def directory(self) -> Path:
        return Path(self.plan.config.run.dir)

    @property
    def stretch(self) -> Stretch:
        """That of the step done last."""
        return self.plan.timeline.at(max(1, self.step))

    @property
    def objective(self) -> Objective:
        """That of the step done last."""
        return self.stretch.objective_at(max(1, self.step))

    @property
    def bytes_to_save(self) -> int:
        """Of this rank's share of a checkpoint."""
        return sum(box.values.nbytes for box in owned(self.trainer.trunk, self.trainer.optimizer))

    def count(self, step: int, result: StepResult) -> None:
        stretch = self.plan.timeline.at(step)
        self.step = step
        self.samples += stretch.batch_size
        self.tokens += stretch.tokens_per_step
        self.targets += result.targets
        self.last_was_skipped = not result.finite
        self.skipped += self.last_was_skipped

    def save(self, metrics_position: dict | None) -> None:
        """Begin the checkpoint of the current step.
        metrics_position: of metrics.jsonl, known to the rank that writes it. Where the last step was skipped, this
        state may be the cause: no older checkpoint is deleted for it."""
        timeline, stretch = self.plan.timeline, self.stretch
        history = timeline.history(self.step)
        mark(f"saving step {self.step}", limit=LONG)
        self.saver.save(RunState(
            step=self.step, phase=stretch.index, phase_name=stretch.name, objective=self.objective.name,
            samples=self.samples, tokens=self.tokens, targets=self.targets, skipped=self.skipped,
            metrics_position=metrics_position, history_hash=history_hash(history), history=history,
            data_fingerprints=list(dict.fromkeys(timeline.fingerprints.values())),
            tokenizer_fingerprint=self.plan.tokenizer.fingerprint,
            topology=self.topology.as_dict(), versions=versions()),
            always=timeline.phase_ends.union(self.plan.config.checkpoint.steps), delete=not self.last_was_skipped)
        self.saved_step = self.step


def start(plan: Plan, topology: Topology, origin: Origin, claim: Claim | None = None) -> Run:
    """The run of `plan` with the state that `origin` names; collective. claim: on the run directory."""
    config = plan.config
    performance, precision = config.performance, config.precision
    length = max(stretch.data.sequence_length for stretch in plan.timeline.stretches)
    mark("building the trunk", limit=LONG)
    trunk = build_trunk(config.model, topology, plan.dtype, length, config.run.seed,
                        config.parallel.sequence, performance, precision)
    if performance.overlap_tensor:
        mcore.start_tensor_overlap(config.batch.micro_size * config.data.sequence_length, config.model.hidden_size,
                                   topology.tensor, precision.fp8 is not None)
    ddp = wrap(trunk, *(topology.data > 1 and performance.on_gpu(name)
                        for name in ("overlap_gradients", "overlap_parameters")))
    trainer = Trainer(ddp, build_optimizer(ddp, config.optimizer), topology, plan.vocabulary,
                      performance.batches_ahead, precision.fp8_evaluation)
    make_fp8_state(trunk)
    distance = _distance(plan, topology, trunk, origin) if config.logging.distance else None
    if origin.checkpoint is not None:
        mark(f"loading {origin.checkpoint}", limit=LONG)
        load = loading.load_weights if origin.kind == "weights" else loading.load
        try:
            load(origin.checkpoint, trunk, trainer.optimizer)
        except IntegrityError as error:
            raise AgreedError(str(error)) from None  # checked by all ranks together
    saver = Saver(Path(config.run.dir) / "checkpoints", trunk, trainer.optimizer, config.checkpoint.keep,
                  config.checkpoint.async_, claim=claim)
    if origin.kind not in ("resume", "fork"):
        return Run(plan, topology, trainer, saver, origin, distance=distance)
    state = origin.state
    changed = changed_keys({"topology": state.topology, "versions": state.versions},
                           {"topology": topology.as_dict(), "versions": versions()})
    return Run(replace(plan, timeline=plan.timeline.adopting(state.history)), topology, trainer, saver,
               replace(origin, changed=origin.changed | changed), state.step, state.samples, state.tokens,
               state.targets, state.skipped, saved_step=state.step, distance=distance)


def _distance(plan: Plan, topology: Topology, trunk: Trunk, origin: Origin) -> Distance:
    """Knows the first weights of the phase inside which the run goes on."""
    distance, step = Distance(trunk, topology), origin.state.step if origin.kind in ("resume", "fork") else 0
    stretch = plan.timeline.at(step + 1)
    if stretch.phase_start < step:
        mark("reading the weights that the phase began with", limit=LONG)
        distance.recall(plan.config, plan.timeline.beginning, stretch.name, stretch.phase_start)
    return distance
