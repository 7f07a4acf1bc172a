"""How long a checkpoint keeps training waiting, and how long a resume takes, on two data-parallel ranks.

    python benchmarks/checkpoint.py [--preset 210m] [--dtype fp32] [--rounds 5] [--directory DIR]

Two ranks (gloo on a CPU) hold the preset with its optimizer. After one save of each kind that is not counted, the
rounds take turns, so that a disk whose speed drifts is unfair to none:

    synchronous     `Saver(asynchronous=False)`: until the checkpoint is durable and `latest` names it
    blocked         `Saver(asynchronous=True)`: until `save` returns and training goes on
    durable         the same save, until it is durable (nothing is trained meanwhile)
    megatron.core   its own `dist_checkpointing.save` of the same state, same format: no checksums, not published
    load            verify every checksum and fill the trunk and its optimizer (page cache: as the rounds leave it)

Prints medians with their range, blocked / synchronous round by round, and `--json PATH` keeps everything.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCABULARY = 32000
RANKS = 2


def build(arguments):
    """Trunk and optimizer of this rank."""
    import torch

    from megatron_encdec.engine.config import OptimizerSettings
    from megatron_encdec.engine.optimizer import build_optimizer, wrap
    from megatron_encdec.model.config import ModelConfig
    from megatron_encdec.model.trunk import build_trunk
    from megatron_encdec.platform.distributed import initialize

    topology = initialize()
    model = ModelConfig.from_yaml({"preset": arguments.preset, "vocabulary_size": VOCABULARY}, "model")
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    trunk = build_trunk(model, topology, dtype, 128, seed=1)
    return model, trunk, build_optimizer(wrap(trunk), OptimizerSettings())


def megatron_save(directory: Path, trunk, optimizer) -> float:
    """Seconds of megatron.core's own synchronous save."""
    import torch.distributed as dist

    from megatron_encdec.engine.boxes import SHARDING
    from megatron_encdec.platform import megatron as mcore

    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
    dist.barrier()
    start = time.perf_counter()
    weights = trunk.sharded_state_dict(metadata=SHARDING)
    state = {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=SHARDING)}
    mcore.dist_checkpointing.save(state, str(directory))
    dist.barrier()
    return time.perf_counter() - start


def state_at(step: int):
    """A run_state.json."""
    from megatron_encdec.engine.checkpoint import RunState, versions

    return RunState(step=step, phase=0, phase_name="only", objective="clm", samples=0, tokens=0, targets=0,
                    history_hash="", history={}, data_fingerprints=[], tokenizer_fingerprint=None, topology={},
                    versions=versions())


def measure(arguments, directory: Path) -> dict | None:
    """All rounds, by one rank; rank 0 returns the seconds by name, a list each."""
    import torch.distributed as dist

    from megatron_encdec.engine import loading
    from megatron_encdec.engine.saver import Saver
    from megatron_encdec.platform.distributed import shutdown

    model, trunk, optimizer = build(arguments)
    plain = Saver(directory / "synchronous", trunk, optimizer, keep=1, asynchronous=False)
    beside = Saver(directory / "asynchronous", trunk, optimizer, keep=1, asynchronous=True)
    names = ("synchronous", "blocked", "durable", "megatron.core", "load")
    seconds, size = {name: [] for name in names}, 0
    for number in range(arguments.rounds + 1):
        dist.barrier()
        plain.save(state_at(number + 1))
        event, = plain.poll()
        dist.barrier()
        beside.save(state_at(number + 1))
        later, = beside.wait()
        if event.error or later.error:
            raise RuntimeError(event.error or later.error)
        peer = megatron_save(directory / "megatron", trunk, optimizer)
        dist.barrier()
        start = time.perf_counter()
        loading.load(later.path, trunk, optimizer)
        dist.barrier()
        if number:  # the first allocates, and meets cold code
            values = (event.seconds_blocked, later.seconds_blocked, later.seconds_total, peer,
                      time.perf_counter() - start)
            for name, value in zip(names, values, strict=True):
                seconds[name].append(value)
        size = event.bytes
    rank = dist.get_rank()
    shutdown()
    return {"seconds": seconds, "bytes": size, "parameters": model.parameter_count()} if rank == 0 else None


def report(result: dict, arguments) -> None:
    """The table."""
    seconds = result["seconds"]
    print(f"{arguments.preset}, {arguments.dtype}: {result['parameters'] / 1e6:.0f}M parameters, a checkpoint of "
          f"{result['bytes'] / 1e9:.2f} GB, {RANKS} data-parallel ranks, {arguments.rounds} rounds")
    for name, values in seconds.items():
        print(f"  {name:<14} {statistics.median(values):8.3f} s   ({min(values):.3f} .. {max(values):.3f})   "
              f"{result['bytes'] / 1e9 / statistics.median(values):6.2f} GB/s")
    ratios = [100 * a / b for a, b in zip(seconds["blocked"], seconds["synchronous"], strict=True)]
    print(f"  blocked / synchronous: {statistics.median(ratios):.1f} %   "
          f"({', '.join(f'{ratio:.1f}' for ratio in ratios)})")


def main() -> None:
    """Start the ranks and print what rank 0 measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="210m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where to write, on the disk to be measured; default: a temporary one")
    parser.add_argument("--json", help="write all measurements here")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        result = measure(arguments, Path(arguments.directory))
        if result:
            (Path(arguments.directory) / "result.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        ranks = [subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--directory", directory, "--rank", str(rank)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                 "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}) for rank in range(RANKS)]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank failed")
        result = json.loads((Path(directory) / "result.json").read_text())
    report(result, arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
