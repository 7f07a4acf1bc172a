"""What computing logits at labelled positions only gains: measured, and as the FLOP count predicts, in one run.

    python benchmarks/masked_head.py [--ratios 0.15 0.3 0.5] [--width 512] [--vocabulary 32768] [--rounds 5]

A forward and backward pass of a trunk (no optimizer), labels at every position and at a share of them. What the parts
amount to is the count's (model/config.py), what they cost the machine's: the trunk without labels and the head with all
of them are timed on their own, which gives each part its FLOP rate, and with these rates the count predicts a ratio.

`plain` is the prediction with one rate for all FLOPs.
"""

import argparse
import json
import statistics
import time

import numpy as np


def seconds_of(trunk, batch) -> float:
    """Of one forward and backward pass."""
    import torch

    from megatron_encdec.platform.device import device, device_type

    tensors = [torch.from_numpy(array).to(device()) for array in (
        batch.inputs_BS, batch.cu_seqlens, batch.label_positions_N, batch.labels_N)]
    start = time.perf_counter()
    inputs_BS, cuts, positions_N, labels_N = tensors
    context = trunk.attention_context(batch.attention, cuts, batch.longest, batch.isolated, *inputs_BS.shape)
    trunk(inputs_BS, context, positions_N, labels_N, summed=True).backward()
    for parameter in trunk.parameters():
        parameter.grad = None
    if device_type() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def batch_with(share: float, arguments):
    """A micro-batch of whole windows, bidirectional, with labels at exactly this share of positions."""
    from megatron_encdec.objectives.base import MicroBatch

    draw = np.random.default_rng(0)
    tokens = arguments.windows * arguments.length
    inputs_BS = draw.integers(0, arguments.vocabulary, (arguments.windows, arguments.length))
    positions_N = np.sort(draw.permutation(tokens)[: round(share * tokens)])
    cuts = np.arange(0, tokens + 1, arguments.length, dtype=np.int32)
    return MicroBatch(inputs_BS, positions_N, inputs_BS.reshape(-1)[positions_N], cuts, arguments.length, False,
                      "bidirectional", tuple(range(arguments.windows)))


def measure(arguments) -> dict[float, list[float]]:
    """Seconds by share of labelled positions, a number a round; shares 0 and 1 too."""
    import torch

    from megatron_encdec.model.config import ModelConfig
    from megatron_encdec.model.trunk import build_trunk
    from megatron_encdec.platform.distributed import initialize

    torch.set_num_threads(arguments.threads)
    heads = arguments.width // 64
    model = ModelConfig(arguments.layers, arguments.width, 4 * arguments.width, heads, heads,
                        vocabulary_size=arguments.vocabulary)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    trunk = build_trunk(model, initialize(), dtype, arguments.length, 1)
    shares = [0.0, 1.0, *arguments.ratios]
    batches = {share: batch_with(share, arguments) for share in shares}
    for batch in batches.values():
        seconds_of(trunk, batch)
    taken = {share: [] for share in shares}
    for _ in range(arguments.rounds):
        for share in shares:
            taken[share].append(seconds_of(trunk, batches[share]))
    return model, taken


def main() -> None:
    """A line a ratio: speed-up measured, predicted, and how far apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.3, 0.5])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    from megatron_encdec.model.flops import training_flops, whole_pairs

    model, taken = measure(arguments)
    tokens = arguments.windows * arguments.length
    pairs = whole_pairs(tokens, arguments.length, "bidirectional")
    flops = {share: training_flops(model, tokens, pairs, share * tokens) for share in taken}
    results = {}
    for ratio in arguments.ratios:
        measured = statistics.median(whole / part for whole, part in zip(taken[1.0], taken[ratio], strict=True))
        head_share = statistics.median(1 - none / whole for none, whole in zip(taken[0.0], taken[1.0], strict=True))
        counted_share = (flops[ratio] - flops[0.0]) / (flops[1.0] - flops[0.0])
        predicted = 1 / (1 - head_share + head_share * counted_share)
        plain = flops[1.0] / flops[ratio]
        results[ratio] = {"measured": measured, "predicted": predicted, "plain": plain}
        print(f"{ratio:.0%} labelled: measured {measured:.3f} x, predicted {predicted:.3f} x "
              f"({measured / predicted - 1:+.1%}), by one rate for all {plain:.3f} x ({measured / plain - 1:+.1%})")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"arguments": vars(arguments), "seconds": taken, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
