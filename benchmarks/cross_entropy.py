"""Peak memory and time of the head's loss, forward and backward: torch's plain one and ours, in one run.

    python benchmarks/cross_entropy.py [--positions 8192] [--vocabulary 128256] [--width 768] [--dtype fp32] [--chunk N]

    plain        logits, float(), torch's cross_entropy over all of them
    one chunk    ours with all positions in one chunk: what working in place alone gives
    chunked      ours as it trains (`performance.head_chunk` left out, or --chunk)
    kernels      the same with Triton's kernels, where there is a GPU

Each in a process of its own. Memory is the peak above what was there before the forward pass, the inputs; so the
gradients of hidden states and table, which nobody can do without, are in it. On a GPU by torch's allocator, on a CPU by
the process's resident set.
"""

import argparse
import json
import multiprocessing
import resource
import time

from megatron_encdec.platform.optional import has_gpu_driver


def bytes_now(device: str) -> int:
    """Memory in use."""
    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes(device: str) -> int:
    """The most memory that was in use so far."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loss_function(variant: str, arguments):
    """(hidden, table, labels) -> the loss to differentiate."""
    import torch
    import torch.distributed as dist

    from megatron_encdec.model.head import linear_cross_entropy
    from megatron_encdec.model.performance import PerformanceSettings

    kernels = PerformanceSettings().kernels() if variant == "kernels" else None

    def plain(hidden_NH, table_VH, labels_N):
        return torch.nn.functional.cross_entropy((hidden_NH @ table_VH.T).float(), labels_N, reduction="sum")

    def ours(hidden_NH, table_VH, labels_N):
        chunk = arguments.positions if variant == "one chunk" else arguments.chunk
        return linear_cross_entropy(hidden_NH, table_VH, labels_N, arguments.vocabulary, dist.group.WORLD, chunk,
                                    kernels)[0]

    return plain if variant == "plain" else ours


def measure(variant: str, arguments, answer) -> None:
    """One variant, in this process; puts {bytes, seconds, loss}."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    table_VH = (0.02 * torch.randn(arguments.vocabulary, arguments.width, device=device)).to(dtype).requires_grad_()
    labels_N = torch.randint(0, arguments.vocabulary, (arguments.positions,), device=device)
    loss = loss_function(variant, arguments)

    def once(positions):
        hidden_NH = torch.randn(positions, arguments.width, device=device).to(dtype).requires_grad_()
        table_VH.grad = None
        start = time.perf_counter()
        total = loss(hidden_NH, table_VH, labels_N[:positions])
        total.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, total.item() / positions

    once(64)  # libraries are loaded, and compilers have run, before anything is measured
    table_VH.grad = None
    before = bytes_now(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, value = zip(*(once(arguments.positions) for _ in range(arguments.repeat)), strict=True)
    answer.put({"bytes": peak_bytes(device) - before, "seconds": min(seconds), "loss": value[0]})


def main() -> None:
    """Every variant in turn, then ratios to the plain one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    processes, results = multiprocessing.get_context("spawn"), {}
    for variant in ("plain", "one chunk", "chunked", *(["kernels"] if has_gpu_driver() else [])):
        answer = processes.Queue()
        worker = processes.Process(target=measure, args=(variant, arguments, answer))
        worker.start()
        found = results[variant] = answer.get(timeout=1800)
        worker.join()
        plain = results["plain"]
        print(f"{variant:<10} {found['bytes'] / 2**20:>9,.0f} MiB  1/{plain['bytes'] / found['bytes']:<5.1f} "
              f"{found['seconds']:>8.3f} s  {plain['seconds'] / found['seconds']:.2f} x as quick   "
              f"loss {found['loss']:.6f}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"arguments": vars(arguments), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
