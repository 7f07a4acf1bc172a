"""Tokens per second of our training step and of a plain transformers loop: same shape, batch and dtype, one run.

    python benchmarks/train_cpu.py [--dtype bf16] [--rounds 5] [--steps 4] [--length 512] [--windows 8]

Two worker processes take turns (ours, theirs, ours, ...), so a machine whose speed drifts is unfair to neither.
Both see the same random documents and do a whole optimizer step: forward, backward, clipping at 1.0, AdamW.

    ours           phases of this package on Megatron-core (DDP, DistributedOptimizer, fp32 masters)
    transformers   LlamaForCausalLM / EuroBertForMaskedLM, labels -100 where there is none, fused AdamW on
                   parameters of the same dtype (in bf16 without masters: cheaper than ours)

Prints each median and the ratio ours / transformers, round by round, and `--json PATH` keeps them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np

VOCABULARY, MASK_ID, RATIO = 8192, 1, 0.4


class RandomDocuments:
    """Windows of random tokens without document boundaries, which the plain loop could not respect."""

    def __init__(self, length: int):
        self.sequence_length, self.seed = length, 7

    def sample(self, index: int):
        """Window number `index`."""
        from megatron_encdec.data.samples import Sample

        tokens_S = np.random.default_rng(index).integers(8, VOCABULARY, self.sequence_length)
        return Sample(index, 0, 0, index, tokens_S, np.array([self.sequence_length]))


def objective_of(name: str):
    """`clm`, `mlm`, or half of each."""
    from megatron_encdec.objectives.base import Objective

    both = {"name": "mixture", "parts": [{"objective": "clm", "weight": 1},
                                         {"objective": f"mlm:{RATIO}", "weight": 1}]}
    return Objective.from_yaml({"mlm": f"mlm:{RATIO}", "mixture": both}.get(name, name), "objective")


def our_trainer(arguments):
    """Trunk and optimizer of ours."""
    import torch

    from megatron_encdec.engine.config import OptimizerSettings
    from megatron_encdec.engine.optimizer import build_optimizer, wrap
    from megatron_encdec.model.config import ModelConfig
    from megatron_encdec.model.trunk import build_trunk
    from megatron_encdec.objectives.base import Vocabulary
    from megatron_encdec.platform.distributed import initialize
    from megatron_encdec.training.step import Trainer

    model = ModelConfig.from_yaml({"preset": arguments.preset, "vocabulary_size": VOCABULARY}, "model")
    topology = initialize()
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    ddp = wrap(build_trunk(model, topology, dtype, arguments.length, 1))
    vocabulary = Vocabulary(VOCABULARY, frozenset(range(8)), MASK_ID)
    return Trainer(ddp, build_optimizer(ddp, OptimizerSettings()), topology, vocabulary)


def our_step(arguments):
    """A function (objective name, step) that does one optimizer step of ours."""
    from megatron_encdec.training.work import Work

    trainer, samples, windows = our_trainer(arguments), RandomDocuments(arguments.length), arguments.windows
    return lambda name, step: trainer.train_step(
        Work(samples, objective_of(name), range((step - 1) * windows, step * windows), windows), 1e-3)


def transformers_step(arguments):
    """The same with stock classes and a loop as anybody would write it."""
    import torch
    from transformers import EuroBertConfig, EuroBertForMaskedLM, LlamaConfig, LlamaForCausalLM

    from megatron_encdec.model.config import ModelConfig
    from megatron_encdec.objectives.base import Vocabulary, collate

    shape = ModelConfig.from_yaml(arguments.preset, "model")
    sizes = dict(vocab_size=VOCABULARY, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
                 num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads,
                 num_key_value_heads=shape.num_query_groups, max_position_embeddings=arguments.length,
                 tie_word_embeddings=False, pad_token_id=0, bos_token_id=0, eos_token_id=0, use_cache=False)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    torch.manual_seed(1)
    models = {"clm": LlamaForCausalLM(LlamaConfig(**sizes)), "mlm": EuroBertForMaskedLM(EuroBertConfig(**sizes))}
    models = {name: model.to(dtype).train() for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1,
                                          fused=True) for name, model in models.items()}
    samples, vocabulary = RandomDocuments(arguments.length), Vocabulary(VOCABULARY, frozenset(range(8)), MASK_ID)

    def step(name, number):
        windows = [samples.sample(number * arguments.windows + i) for i in range(arguments.windows)]
        batch = collate(objective_of(name), windows, samples.seed, vocabulary)
        inputs = torch.from_numpy(batch.inputs_BS)
        if name == "clm":
            labels = inputs
        else:
            labels = torch.full((inputs.numel(),), -100)
            labels[torch.from_numpy(batch.label_positions_N)] = torch.from_numpy(batch.labels_N)
            labels = labels.view_as(inputs)
        loss = models[name](input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()
        return loss.item()

    return step


def work(arguments) -> None:
    """A worker: for each line `objective steps` on stdin, do that many steps and print the seconds."""
    step = (our_step if arguments.worker == "ours" else transformers_step)(arguments)
    number = 0
    for line in sys.stdin:
        name, steps = line.split()
        start = time.perf_counter()
        for _ in range(int(steps)):
            number += 1
            step(name, number)
        print(f"seconds {time.perf_counter() - start}", flush=True)


def ask(process, objective: str, steps: int) -> float:
    """Let a worker do `steps` steps; its seconds."""
    process.stdin.write(f"{objective} {steps}\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("seconds"):
        if not line:
            raise RuntimeError("a worker ended early")
    return float(line.split()[1])


def main() -> None:
    """Start the workers, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--worker", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    workers = {name: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--worker", name], text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for name in ("ours", "transformers")}
    tokens = arguments.steps * arguments.windows * arguments.length
    results = {}
    for objective in ("clm", "mlm"):
        for process in workers.values():
            ask(process, objective, 2)  # warm-up
        speeds = {name: [] for name in workers}
        for _ in range(arguments.rounds):
            for name, process in workers.items():
                speeds[name].append(tokens / ask(process, objective, arguments.steps))
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True)]
        results[objective] = {**{name: statistics.median(values) for name, values in speeds.items()},
                              "ratio": statistics.median(ratios), "ratios": ratios}
        print(f"{objective} {arguments.dtype}: ours {results[objective]['ours']:,.0f} tokens/s, transformers "
              f"{results[objective]['transformers']:,.0f} tokens/s, ratio {results[objective]['ratio']:.2f} "
              f"({min(ratios):.2f} .. {max(ratios):.2f})")
    for process in workers.values():
        process.stdin.close()
        process.wait()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
