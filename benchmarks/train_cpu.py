"""Tokens per second of our training step and of a plain transformers loop: same shape, weights, batch, dtype, one run.

    python benchmarks/train_cpu.py [--dtype fp32 bf16] [--rounds 5]                          the sizes of `CELLS`
    python benchmarks/train_cpu.py --preset 210m [--vocabulary 32000] [--length 512] [--windows 4]         one size

Two worker processes take turns (ours, theirs, ours, ...), so a machine whose speed drifts is unfair to neither.
Both begin with the same weights, see the same random documents and do a whole optimizer step: forward, backward,
clipping at 1.0, AdamW.

    ours           a phase of this package on Megatron-core (DDP, DistributedOptimizer, fp32 masters)
    transformers   LlamaForCausalLM / EuroBertForMaskedLM, labels -100 where there is none, fused AdamW on
                   parameters of the same dtype (in bf16 without masters: cheaper than ours)

Prints each median, the ratio ours / transformers round by round, the largest difference of a loss, and with --breakdown
where a step goes: seconds of torch's profiler, which itself costs some. `--json PATH` keeps all of it.

--reference lets the plain loop do the same steps in fp64 when all is timed, and says how far each side's losses are
from those: torch's norm of a large fp32 tensor on a CPU, by which the plain loop clips, is off by more than rounding.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

CELLS = (("tiny", 8192, 512, 8), ("tiny", 32000, 512, 8), ("210m", 32000, 512, 4))  # vocabulary, length, windows
MASK_ID, RATIO, RATE = 1, 0.4, 1e-3
COSTS = {"products": ("mm", "bmm", "addmm"), "attention": ("scaled_dot_product",),
         "softmax of the head": ("_log_softmax", "log_softmax", "exp", "amax", "nll_loss", "_LinearCrossEntropy"),
         "update": ("_fused_adamw", "linalg_vector_norm", "_foreach"),
         "copies": ("copy", "cat", "clone", "contiguous", "fill", "zero", "constant_pad", "slice_backward")}


class RandomDocuments:
    """Windows of random tokens without document boundaries, which the plain loop could not respect."""

    def __init__(self, length: int, vocabulary: int):
        self.sequence_length, self.seed, self._vocabulary = length, 7, vocabulary

    def sample(self, index: int):
        """Window number `index`."""
        from megatron_encdec.data.samples import Sample

        tokens_S = np.random.default_rng(index).integers(8, self._vocabulary, self.sequence_length)
        return Sample(index, 0, 0, index, tokens_S, np.array([self.sequence_length]))


def objective_of(name: str):
    """`clm`, `mlm`, or half of each."""
    from megatron_encdec.objectives.base import Objective

    both = {"name": "mixture", "parts": [{"objective": "clm", "weight": 1},
                                         {"objective": f"mlm:{RATIO}", "weight": 1}]}
    return Objective.from_yaml({"mlm": f"mlm:{RATIO}", "mixture": both}.get(name, name), "objective")


def model_of(arguments):
    """The trunk's shape."""
    from megatron_encdec.model.config import ModelConfig

    return ModelConfig.from_yaml({"preset": arguments.preset, "vocabulary_size": arguments.vocabulary}, "model")


def dtype_of(arguments):
    """Of parameters and products."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[arguments.dtype]


def our_trunk(arguments):
    """(trunk, topology); with the same weights each time."""
    from megatron_encdec.model.trunk import build_trunk
    from megatron_encdec.platform.distributed import initialize

    topology = initialize()
    return build_trunk(model_of(arguments), topology, dtype_of(arguments), arguments.length, 1), topology


def our_trainer(arguments):
    """Trunk and optimizer of ours."""
    from megatron_encdec.engine.config import OptimizerSettings
    from megatron_encdec.engine.optimizer import build_optimizer, wrap
    from megatron_encdec.training.step import Trainer

    trunk, topology = our_trunk(arguments)
    ddp = wrap(trunk)
    return Trainer(ddp, build_optimizer(ddp, OptimizerSettings()), topology, vocabulary_of(arguments))


def vocabulary_of(arguments):
    """Eight special tokens, one of them the mask."""
    from megatron_encdec.objectives.base import Vocabulary

    return Vocabulary(arguments.vocabulary, frozenset(range(8)), MASK_ID)


def our_step(arguments):
    """A function (number of the step) that does one optimizer step of ours and gives its loss."""
    from megatron_encdec.training.work import Work

    trainer, windows = our_trainer(arguments), arguments.windows
    samples, objective = RandomDocuments(arguments.length, arguments.vocabulary), objective_of(arguments.objective)
    return lambda step: trainer.train_step(
        Work(samples, objective, range((step - 1) * windows, step * windows), windows), RATE).loss


def stock_model(arguments):
    """The class of transformers for the objective, with our first weights."""
    import torch
    from transformers import EuroBertConfig, EuroBertForMaskedLM, LlamaConfig, LlamaForCausalLM

    from megatron_encdec.interop.names import canonical_weights, to_hugging_face

    shape = model_of(arguments)
    sizes = dict(vocab_size=shape.vocabulary_size, hidden_size=shape.hidden_size,
                 intermediate_size=shape.ffn_hidden_size, num_hidden_layers=shape.num_layers,
                 num_attention_heads=shape.num_attention_heads, num_key_value_heads=shape.num_query_groups,
                 max_position_embeddings=arguments.length, rms_norm_eps=shape.norm_eps, mask_token_id=MASK_ID,
                 rope_theta=shape.rope_theta, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0,
                 eos_token_id=0, use_cache=False)
    kind, config = {"clm": (LlamaForCausalLM, LlamaConfig), "mlm": (EuroBertForMaskedLM, EuroBertConfig)}[
        arguments.objective]
    stock = kind(config(**sizes))
    trunk, _ = our_trunk(arguments)
    with torch.no_grad():
        stock.load_state_dict({key: tensor.clone() for key, tensor in to_hugging_face(
            canonical_weights(trunk), shape).items()})
    return stock.to(dtype_of(arguments)).train()


def transformers_step(arguments):
    """The same with stock classes and a loop as anybody would write it."""
    import torch

    from megatron_encdec.objectives.base import collate

    model = stock_model(arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1,
                                  fused=True)
    samples = RandomDocuments(arguments.length, arguments.vocabulary)
    objective, vocabulary = objective_of(arguments.objective), vocabulary_of(arguments)

    def step(number):
        windows = [samples.sample((number - 1) * arguments.windows + i) for i in range(arguments.windows)]
        batch = collate(objective, windows, samples.seed, vocabulary)
        inputs = torch.from_numpy(batch.inputs_BS)
        if arguments.objective == "clm":
            labels = inputs
        else:
            labels = torch.full((inputs.numel(),), -100)
            labels[torch.from_numpy(batch.label_positions_N)] = torch.from_numpy(batch.labels_N)
            labels = labels.view_as(inputs)
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def where_it_goes(work) -> dict[str, float]:
    """Seconds of the operators that `work` runs, by what they are for; `Python` is the rest."""
    from torch.profiler import ProfilerActivity, profile

    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    whole = time.perf_counter() - start
    seconds = Counter()
    for one in found.key_averages():
        name = one.key.removeprefix("aten::").lstrip("_")
        if one.key.startswith("aten::") or one.key == "_LinearCrossEntropy":
            group = next((group for group, starts in COSTS.items() if name.startswith(tuple(
                start.lstrip("_") for start in starts))), "elementwise")
            seconds[group] += one.self_cpu_time_total / 1e6
    return {**seconds, "Python": max(0.0, whole - sum(seconds.values()))}


def work(arguments) -> None:
    """A worker: for each number on stdin that many steps, their seconds and losses printed; for 0 where a step goes."""
    step = (our_step if arguments.worker == "ours" else transformers_step)(arguments)
    number = 0
    for line in sys.stdin:
        losses, start = [], time.perf_counter()
        if not int(line):
            number += 1
            found = where_it_goes(lambda number=number: step(number))
        else:
            for _ in range(int(line)):
                number += 1
                losses.append(step(number))
            found = {"seconds": time.perf_counter() - start, "losses": losses}
        print(f"found {json.dumps(found)}", flush=True)


def ask(process, steps: int) -> dict:
    """Let a worker do `steps` steps; what it found."""
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("found "):
        if not line:
            raise RuntimeError("a worker ended early")
    return json.loads(line.removeprefix("found "))


def start(name: str, options: list) -> subprocess.Popen:
    """A worker."""
    return subprocess.Popen([sys.executable, __file__, *map(str, options), "--worker", name], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen) -> None:
    """A worker ends at the end of its stdin."""
    process.stdin.close()
    process.wait()


def apart(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of a loss."""
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def from_fp64(options: list, losses: dict[str, list[float]]) -> dict[str, float]:
    """How far each side's losses are from those of the plain loop in fp64."""
    reference = start("reference", options)
    exact = ask(reference, len(losses["ours"]))["losses"]
    finish(reference)
    return {name: apart(values, exact) for name, values in losses.items()}


def measure(arguments, preset: str, vocabulary: int, length: int, windows: int, dtype: str, objective: str) -> dict:
    """One row."""
    options = ["--preset", preset, "--vocabulary", vocabulary, "--length", length, "--windows", windows,
               "--dtype", dtype, "--objective", objective]
    workers = {name: start(name, options) for name in ("ours", "transformers")}
    losses = {name: ask(process, 2)["losses"] for name, process in workers.items()}  # warm-up
    tokens, speeds = arguments.steps * windows * length, {name: [] for name in workers}
    for _ in range(arguments.rounds):
        for name, process in workers.items():
            found = ask(process, arguments.steps)
            speeds[name].append(tokens / found["seconds"])
            losses[name] += found["losses"]
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True)]
    row = {**{name: statistics.median(values) for name, values in speeds.items()}, "ratio": statistics.median(ratios),
           "ratios": ratios, "first_losses": {name: values[:2] for name, values in losses.items()},
           "loss_difference": apart(*losses.values())}
    if arguments.breakdown:
        row["costs"] = {name: ask(process, 0) for name, process in workers.items()}
    for process in workers.values():
        finish(process)
    if arguments.reference:
        row["from_fp64"] = from_fp64(options, losses)
    return row


def show(row: dict, preset: str, vocabulary: int, dtype: str, objective: str) -> None:
    """A line of it, and of each side's costs."""
    for name, costs in row.get("costs", {}).items():
        parts = ", ".join(f"{group} {seconds:.2f}" for group, seconds in sorted(costs.items(), key=lambda one: -one[1]))
        print(f"    {name}, s: {parts}")
    if found := row.get("from_fp64"):
        print("    losses within " + ", ".join(f"{far:.0e} ({name})" for name, far in found.items())
              + " of the plain loop's in fp64")
    print(f"{preset} {vocabulary} {dtype} {objective}: ours {row['ours']:,.0f} tokens/s, transformers "
          f"{row['transformers']:,.0f} tokens/s, losses within {row['loss_difference']:.0e}, ratio {row['ratio']:.2f} "
          f"({min(row['ratios']):.2f} .. {max(row['ratios']):.2f})", flush=True)


def main() -> None:
    """Start the workers, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="one size alone")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--breakdown", action="store_true", help="where a step goes, on both sides")
    parser.add_argument("--reference", action="store_true", help="compare losses with those in fp64 as well")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--objective", default="clm", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=("ours", "transformers", "reference"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        arguments.dtype = "fp64" if arguments.worker == "reference" else arguments.dtype[0]
        work(arguments)
        return
    one = (arguments.preset, arguments.vocabulary, arguments.length, arguments.windows)
    rows = {}
    for preset, vocabulary, length, windows in [one] if arguments.preset else CELLS:
        for dtype in arguments.dtype:
            for objective in ("clm", "mlm"):
                row = measure(arguments, preset, vocabulary, length, windows, dtype, objective)
                rows[f"{preset} {vocabulary} {dtype} {objective}"] = row
                show(row, preset, vocabulary, dtype, objective)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
