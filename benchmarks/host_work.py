"""Host work of a GPU step, counted on a CPU: kernels, waits for the device, Python time, prepared windows.

    python benchmarks/host_work.py [--preset 610m] [--layers torch]
    python benchmarks/host_work.py --layers transformer_engine [--fp8 current]

    (PYTHONPATH=.venv-te .venv/bin/python ..., as ENCDEC_ENV=te of tests/run.sh has it)

What the host does depends on the number of layers, parameters and micro-batches, not on widths: so the preset's layers
are built narrow, and a step of them is counted. Transformer Engine's layers are its own Python over a stand-in for its
binding (tests/te_binding.py); a call of the binding counts as one kernel, whatever it launches, and the stand-in's own
work as nothing. One training step with one micro-batch and one with three tell what a micro-batch costs, and what the
update; the update's norm is the one for a CPU, a GPU's is one kernel.

    kernels    operators that are no views and no bare allocations; the driver launches about as many kernels
    waits      operators that hand a number to Python: the host waits there until the device is through
    host       all of the host's CPU seconds, the stand-in's answers being those of the step before
    python     those by whose function ran, from samples of the stack every few ms of CPU time. An
               operator of torch counts for the function that calls it; so does the arithmetic of what is one Triton
               kernel on a GPU and several operators here: rotary embedding, SwiGLU, the head
    preparing  reading, masking and packing a micro-batch at its full size, in a thread of its own

Held against the seconds that a device at 45 % of 989 TFLOP/s needs for such a micro-batch (docs/gpu.md).
"""

import argparse
import contextlib
import json
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import gpu_cells

ROOT = Path(__file__).resolve().parent.parent
PEAK, SHARE, LIMIT = 989e12, 0.45, 0.05  # FLOP/s of the datasheet in bf16, of which so much; ours of a step at most
LENGTH = 32  # of the narrow windows that are counted
OWNERS = {"ours": "/megatron_encdec/", "megatron.core": "/megatron/core/", "Transformer Engine": "/transformer_engine/",
          "torch": "/torch/"}


def counting(inside: list):
    """A mode that counts operators while nothing is `inside` the stand-in: kernels and waits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.kernels, self.waits = Counter(), Counter()

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if not inside:
                name = function._schema.name
                if name == "aten::_local_scalar_dense":
                    self.waits[name] += 1
                elif not (_is_view(function) or "empty" in name or name == "aten::detach"):
                    self.kernels[name] += 1
            return function(*arguments, **(keywords or {}))

    return Counting()


def _is_view(function) -> bool:
    return any(out.alias_info is not None and not out.alias_info.is_write for out in function._schema.returns)


class StandIn:
    """Called in the place of each of the binding's functions. calls: how often; recorded: what they returned."""

    def __init__(self, inside: list):
        self.inside, self.calls, self.recorded = inside, Counter(), []
        self._replayed = None

    def __call__(self, function, *arguments, **keywords):
        if function.__name__.startswith(("get_", "create_")):
            return function(*arguments, **keywords)
        if self._replayed is not None:
            return _fresh(next(self._replayed))
        self.calls[function.__name__] += not self.inside
        self.inside.append(function)
        try:
            answer = function(*arguments, **keywords)
        finally:
            self.inside.pop()
        if not self.inside:
            self.recorded.append(answer)
        return answer

    def clear(self) -> None:
        """Forget what was counted and recorded."""
        self.calls.clear()
        self.recorded.clear()

    def replayed(self, step, rounds: int):
        """Call `step` so often with the answers of one call before; yields each one's CPU seconds."""
        self.clear()
        step()
        for _ in range(rounds):
            self._replayed = iter(self.recorded)
            start = time.process_time()
            step()
            yield time.process_time() - start
        self._replayed = None


def _fresh(answer):
    """The same values as new tensors: one that stands in a graph already cannot be returned again."""
    if isinstance(answer, (list, tuple)):
        return type(answer)(map(_fresh, answer))
    return answer.detach() if type(answer).__name__ == "Tensor" else answer


@contextlib.contextmanager
def stand_in(layers: str, around: StandIn):
    """Transformer Engine over its stand-in, whose functions go through `around`; nothing for torch's layers."""
    if layers == "torch":
        yield
        return
    sys.path.insert(0, str(ROOT / "tests"))
    import te_binding

    if te_binding.why_not:
        raise SystemExit(f"--layers transformer_engine: {te_binding.why_not}")
    from megatron_encdec.model import trunk

    trunk.choose_layers = lambda wanted, *_others: wanted  # on a CPU it refuses
    te_binding.around.append(around)
    with te_binding.on_a_gpu():
        yield


def narrow(preset: str, layers: str, fp8: str | None):
    """A trainer of the preset's layers, each of them small."""
    import torch

    from megatron_encdec.engine.boxes import make_fp8_state
    from megatron_encdec.engine.config import OptimizerSettings
    from megatron_encdec.engine.optimizer import build_optimizer, wrap
    from megatron_encdec.model.config import ModelConfig
    from megatron_encdec.model.performance import PerformanceSettings
    from megatron_encdec.model.precision import PrecisionSettings
    from megatron_encdec.model.trunk import build_trunk
    from megatron_encdec.platform.distributed import initialize
    from megatron_encdec.training.step import Trainer

    model = ModelConfig.from_yaml({"preset": preset, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
                                   "num_query_groups": 2, "vocabulary_size": 512, "layers": layers}, "model")
    topology = initialize()
    trunk = build_trunk(model, topology, torch.bfloat16, LENGTH, 1, precision=PrecisionSettings("bf16", fp8),
                        performance=PerformanceSettings(fuse_gradients=layers != "torch"))
    ddp = wrap(trunk)
    optimizer = build_optimizer(ddp, OptimizerSettings(lr=1e-4))
    make_fp8_state(trunk)
    return Trainer(ddp, optimizer, topology, gpu_cells.vocabulary_of(512))


def step_of(trainer, objective: str, micro_batches: int):
    """A function that does one training step of so many micro-batches of two windows."""
    from megatron_encdec.training.work import Work

    work = Work(gpu_cells.RandomDocuments(LENGTH, 512, True), gpu_cells.objective_of(objective),
                range(2 * micro_batches), 2)
    return lambda: trainer.train_step(work, 1e-4)


def count(step, around: StandIn) -> dict[str, Counter]:
    """What one call of `step` launches and waits for."""
    around.clear()
    with counting(around.inside) as mode:
        step()
    return {"kernels": mode.kernels + around.calls, "waits": mode.waits}


def host_time(step, around: StandIn, rounds: int = 40) -> Counter:
    """CPU seconds of one call of `step`: `host` all of them, median, and those of each of `OWNERS`, mean."""
    samples, seconds = Counter(), []

    def sample(_signal, frame):
        samples[_owner(frame)] += bool(seconds)  # the first call may do what is done once

    before = signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, 1e-3, 1e-3)
    try:
        for one in around.replayed(step, rounds + 1):
            seconds.append(one)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    each = statistics.mean(seconds[1:]) / max(1, samples.total())
    return Counter(host=statistics.median(seconds[1:]), **{name: each * samples[name] for name in OWNERS})


def _owner(frame) -> str | None:
    """Whose function runs: of the innermost frame that is one of `OWNERS`'; None: of what a GPU's step has not."""
    while frame:
        file = frame.f_code.co_filename
        if file == __file__ or "te_binding" in file or "cpu_backend" in file:
            return None
        for name, part in OWNERS.items():
            if part in file:
                return name
        frame = frame.f_back
    return None


def apart(one: Counter, three: Counter) -> tuple[Counter, Counter]:
    """(of a micro-batch, of the update) from steps with one and with three micro-batches."""
    each = Counter({name: (three[name] - one[name]) / 2 for name in {**one, **three}})
    return each, Counter({name: one[name] - each[name] for name in {**one, **three}})


def full_size(preset: str, objective: str, length: int, micro: int) -> dict:
    """Seconds to prepare a micro-batch, and those that the device needs for it."""
    from megatron_encdec.model.config import ModelConfig
    from megatron_encdec.model.flops import attended_pairs, training_flops
    from megatron_encdec.objectives.base import collate
    from megatron_encdec.training.step import Staged

    model = ModelConfig.from_yaml({"preset": preset, "vocabulary_size": gpu_cells.VOCABULARY}, "model")
    samples = gpu_cells.RandomDocuments(length, gpu_cells.VOCABULARY, True)
    rule, vocabulary = gpu_cells.objective_of(objective), gpu_cells.vocabulary_of(gpu_cells.VOCABULARY)
    seconds = []
    for number in range(9):
        windows = [samples.sample(micro * number + index) for index in range(micro)]
        start = time.process_time()
        batch = collate(rule, windows, samples.seed, vocabulary)
        Staged(batch)
        seconds.append(time.process_time() - start)
    pairs = attended_pairs(batch.cu_seqlens, batch.attention)
    flops = training_flops(model, micro * length, pairs, len(batch.labels_N))
    return {"preparing": statistics.median(seconds), "device": flops / (SHARE * PEAK)}


def measure(arguments) -> dict:
    """Of both objectives."""
    around, found = StandIn([]), {}
    with stand_in(arguments.layers, around):
        trainer = narrow(arguments.preset, arguments.layers, arguments.fp8)
        for objective in ("clm", "mlm"):
            steps = [step_of(trainer, objective, micro_batches) for micro_batches in (1, 3)]
            for step in steps:
                step()  # what is done once
            counts = [count(step, around) for step in steps]
            kernels = apart(counts[0]["kernels"], counts[1]["kernels"])
            waits = apart(counts[0]["waits"], counts[1]["waits"])
            host = apart(*(host_time(step, around) for step in steps))
            found[objective] = {
                **full_size(arguments.preset, objective, arguments.length, arguments.micro),
                **{of: {"kernels": sum(kernels[part].values()), "waits": sum(waits[part].values()),
                        "most": kernels[part].most_common(12), "host": host[part]["host"],
                        "python": {name: host[part][name] for name in OWNERS}}
                   for part, of in enumerate(("micro_batch", "update"))}}
    return found


def show(objective: str, found: dict) -> None:
    """A table of it."""
    device = found["device"]
    print(f"{objective}: the device needs {1e3 * device:.0f} ms for a micro-batch; preparing it takes "
          f"{1e3 * found['preparing']:.1f} ms ({found['preparing'] / device:.1%})")
    for of in ("micro_batch", "update"):
        one = found[of]
        times = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in one["python"].items() if seconds > 5e-5)
        print(f"  {of.replace('_', '-'):12} {one['kernels']:6.0f} kernels  {one['waits']:3.0f} waits  "
              f"host {1e3 * one['host']:.0f} ms  Python, ms: {times}")
    share = found["micro_batch"]["python"]["ours"] / device
    verdict = "within" if share < LIMIT else "OVER"
    print(f"  ours of a micro-batch: {share:.1%} of the time of the device ({verdict} {LIMIT:.0%})")


def main() -> None:
    """Count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="610m")
    parser.add_argument("--layers", choices=("torch", "transformer_engine"), default="torch")
    parser.add_argument("--fp8", choices=("delayed", "current"))
    parser.add_argument("--length", type=int, default=2048, help="of a window at full size")
    parser.add_argument("--micro", type=int, default=12, help="windows of a micro-batch at full size")
    parser.add_argument("--json", metavar="PATH")
    arguments = parser.parse_args()
    found = measure(arguments)
    for objective, one in found.items():
        show(objective, one)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
