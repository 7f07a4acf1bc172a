"""What a mixture of objectives costs beside its parts, in one process on this machine.

    python benchmarks/mixture.py [--preset tiny] [--dtype bf16] [--length 512] [--windows 16] [--rounds 7]

Steps of CLM, of MLM and of a mixture of both take turns. A step's windows are regrouped by attention kind, and the last
micro-batch of each kind may be short, so the ratio tells what that costs:

    seconds of a mixed step / (its FLOPs by kind / the FLOPs a second of a step of that kind alone)

Seconds are CPU seconds of one process (OMP_NUM_THREADS=1), which other work on the machine disturbs least.
Micro-batches hold a quarter of a step's windows. Prints the median over rounds.
"""

import argparse
import statistics
import time

from train_cpu import RandomDocuments, objective_of, our_trainer


def measure(arguments) -> list[float]:
    """The ratio of each round."""
    from megatron_encdec.model.flops import training_flops
    from megatron_encdec.training.work import Work

    trainer, samples, ratios = our_trainer(arguments), RandomDocuments(arguments.length, arguments.vocabulary), []
    model, windows, number = trainer.trunk.model, arguments.windows, 0
    tokens, mixture = windows * arguments.length, objective_of("mixture")
    for _ in range(arguments.rounds + 1):  # the first warms up
        seconds, flops = {}, {}
        for name in ("clm", "mlm", "mixture"):
            start = time.process_time()
            for _ in range(arguments.steps):
                numbers = range(number, number + windows)
                result = trainer.train_step(Work(samples, objective_of(name), numbers, windows // 4), 1e-3)
                flops[name] = training_flops(model, tokens, result.pairs, result.targets)
                number += windows
            seconds[name] = time.process_time() - start
        mixed = [mixture.of_sample(samples.seed, index).name
                 for index in range(number - arguments.steps * windows, number)]
        expected = sum(mixed.count(name) / len(mixed) * seconds[name] for name in ("clm", "mlm"))
        ratios.append(seconds["mixture"] / expected)
        print(f"clm {seconds['clm']:.2f} s, mlm {seconds['mlm']:.2f} s, mixture ({mixed.count('clm')} clm, "
              f"{mixed.count('mlm')} mlm) {seconds['mixture']:.2f} s: {ratios[-1]:.3f}")
    return ratios[1:]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=7)
    ratios = measure(parser.parse_args())
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})")


if __name__ == "__main__":
    main()
