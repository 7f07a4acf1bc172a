#!/usr/bin/env python3
"""Seconds of attention with a sliding window and without one, forward and backward, on a CPU, in one run.

    python benchmarks/sliding_window.py [--length 4096] [--sliding-window 128] [--dtype fp32 bf16] [--rounds 5]

    whole      a layer without a window, as the trunk computes it (`model/attention.py: over_windows`)
    bounded    a layer with one
    mask       what the window's mask costs, once a micro-batch and not once a layer

Queries, keys and values are random; the two take turns. Seconds are CPU seconds of this process with one thread (other
work on the machine counts little), else of a clock. Prints the median of each, and the ratio round by round.
"""

import argparse
import json
import statistics
import time

import torch

from megatron_encdec.model.attention import context_of_windows, over_windows
from megatron_encdec.platform import device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(arguments, kind: str, dtype: torch.dtype) -> dict:
    """Seconds of each round by variant, and the ratios."""
    draw, now = torch.Generator().manual_seed(0), time.process_time if arguments.threads == 1 else time.perf_counter
    heads = (arguments.heads, arguments.groups, arguments.groups)
    rows = [torch.randn(arguments.length, arguments.windows, count, arguments.width, generator=draw).to(dtype)
            .requires_grad_() for count in heads]
    cuts = torch.arange(0, arguments.windows * arguments.length + 1, arguments.length, dtype=torch.int32)
    seconds = {"whole": [], "bounded": [], "mask": []}
    for _ in range(arguments.rounds + 1):  # the first one warms up
        for name, window in (("whole", None), ("bounded", arguments.sliding_window)):
            start = now()
            context = context_of_windows(kind, window, cuts, arguments.windows, arguments.length, False, dtype)
            built = now()
            over_windows(*rows, context).sum().backward()
            seconds[name].append(now() - built)
        seconds["mask"].append(built - start)
    seconds = {name: found[1:] for name, found in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["whole"], seconds["bounded"], strict=True)]
    return {"seconds": seconds, "ratios": ratios}


def main() -> None:
    """Measure, print, and with --json keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("length", 4096), ("sliding-window", 128), ("windows", 1), ("heads", 4), ("groups", 2),
                        ("width", 64), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", help="where to keep every number")
    arguments = parser.parse_args()
    device.choose("cpu")
    torch.set_num_threads(arguments.threads)
    found = {}
    for dtype in arguments.dtype:
        for kind in ("causal", "bidirectional"):
            one = found[f"{dtype} {kind}"] = measure(arguments, kind, DTYPES[dtype])
            whole, bounded, mask = (statistics.median(one["seconds"][name]) for name in ("whole", "bounded", "mask"))
            print(f"{dtype} {kind:14}  whole {whole:.3f} s  bounded {bounded:.3f} s  mask {mask:.3f} s  "
                  f"whole / bounded {statistics.median(one['ratios']):.1f} "
                  f"({min(one['ratios']):.1f} .. {max(one['ratios']):.1f})")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"arguments": vars(arguments), "found": found}, file, indent=1)


if __name__ == "__main__":
    main()
