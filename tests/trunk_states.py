"""A small trunk and its optimizer whose every number is known from where it stands, and ranks as real processes."""

import signal
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from small_run import fork, run_code

from megatron_encdec.engine.boxes import Box, wanted
from megatron_encdec.engine.checkpoint import RunState
from megatron_encdec.engine.config import OptimizerSettings
from megatron_encdec.engine.optimizer import build_optimizer, set_update_count, wrap
from megatron_encdec.model.attention import TorchAttention
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.platform import megatron as mcore


def state_at(step: int) -> RunState:
    """A run_state.json of little content."""
    return RunState(step=step, phase=0, phase_name="only", objective="clm", samples=step, tokens=step, targets=step,
                    history_hash="none", history={}, data_fingerprints=[], tokenizer_fingerprint=None, topology={},
                    versions={})


def make(topology, seed: int = 1, dtype: torch.dtype = torch.float32, **model):
    """(trunk, optimizer) of an odd vocabulary, two layers unless told otherwise."""
    sizes = dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 vocabulary_size=301) | model
    trunk = build_trunk(ModelConfig(**sizes), topology, dtype, 64, seed)
    return trunk, build_optimizer(wrap(trunk), OptimizerSettings())


def expected(box: Box) -> torch.Tensor:
    """What stands in the box: a function of name and global position alone, exact in bf16's 8 bits too."""
    flat = torch.zeros(box.size, dtype=torch.int64)
    for dimension, (start, length) in enumerate(zip(box.offset, box.size, strict=True)):
        place = torch.arange(start, start + length).view([-1 if d == dimension else 1 for d in range(flat.dim())])
        flat = flat * box.shape[dimension] + place
    name = box.key.removeprefix("optimizer.state.param.")  # masters equal their weights
    return ((flat + sum(name.encode())) % 251).to(box.values.dtype)


def give_fp8_state(trunk) -> None:
    """What Transformer Engine's `delayed` recipe keeps in a layer, in every linear layer and in attention."""
    def record(tensors):
        return SimpleNamespace(scale=torch.ones(tensors), amax_history=torch.zeros(4, tensors))

    for module in trunk.decoder.modules():
        if isinstance(module, (mcore.ColumnParallelLinear, mcore.RowParallelLinear, TorchAttention)):
            module.fp8_meta = {"num_gemms": 1, "scaling_fwd": record(3), "scaling_bwd": record(2)}


def fill(trunk, optimizer, updates: int = 7) -> None:
    """Put `expected` everywhere."""
    for box in wanted(trunk, optimizer):
        box.values.copy_(expected(box))
    set_update_count(optimizer, updates)


def wrong(trunk, optimizer) -> list[str]:
    """Names of the boxes that do not hold `expected`."""
    return [box.key for box in wanted(trunk, optimizer) if not torch.equal(box.values, expected(box))]


def run_ranks(count: int, code: str, *arguments, check: bool = True, timeout: float = 300) -> list[str]:
    """Run `code` in `count` forks that find each other over gloo; what each wrote to stdout.

    Ranks that hang are told to print where they are, and that is the error.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        said = [(Path(directory) / f"out{rank}", Path(directory) / f"err{rank}") for rank in range(count)]
        ranks = [fork(run_code, code, *arguments, said=said[rank], WORLD_SIZE=str(count), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
        limit = time.monotonic() + timeout
        while any(rank.poll() is None for rank in ranks):
            failed = check and any(rank.poll() for rank in ranks)
            if failed or time.monotonic() > limit:
                check = True
                for rank in ranks:
                    rank.send_signal(signal.SIGABRT)
                break
            time.sleep(0.05)
        codes = [rank.wait(timeout) for rank in ranks]
        if check and any(codes):
            raise AssertionError("\n".join(f"rank {rank}: {err.read_text()}" for rank, (_, err) in enumerate(said)))
        return [out.read_text() for out, _ in said]

