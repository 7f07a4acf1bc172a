"""A small trunk and its optimizer whose every number is known from where it stands, and ranks as real processes."""

import signal
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from small_run import fork, run_code

from megatron_encdec.engine.boxes import Box, pieces, wanted
from megatron_encdec.engine.checkpoint import RunState
from megatron_encdec.engine.config import OptimizerSettings
from megatron_encdec.engine.optimizer import (
    build_optimizer,
    gradient_norm,
    set_learning_rate,
    set_update_count,
    update,
    wrap,
)
from megatron_encdec.model.attention import TorchAttention
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.platform import megatron as mcore


def state_at(step: int) -> RunState:
    """A run_state.json of little content."""
    return RunState(step=step, phase=0, phase_name="only", objective="clm", samples=step, tokens=step, targets=step,
                    history_hash="none", history={}, data_fingerprints=[], tokenizer_fingerprint=None, topology={},
                    versions={})


def make(topology, seed: int = 1, dtype: torch.dtype = torch.float32, settings: OptimizerSettings | None = None,
         **model):
    """(trunk, optimizer) of an odd vocabulary, two layers unless told otherwise."""
    sizes = dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 vocabulary_size=301) | model
    trunk = build_trunk(ModelConfig(**sizes), topology, dtype, 64, seed)
    return trunk, build_optimizer(wrap(trunk), settings or OptimizerSettings())


def expected(box: Box) -> torch.Tensor:
    """What stands in the box: a function of name and global position alone, exact in bf16's 8 bits too."""
    name = box.key.removeprefix("optimizer.state.param.")  # masters equal their weights
    return ((_positions(box) + sum(name.encode())) % 251).to(box.values.dtype)


def _positions(box: Box) -> torch.Tensor:
    """Of each element in the flattened global tensor."""
    flat = torch.zeros(box.size, dtype=torch.int64)
    for dimension, (start, length) in enumerate(zip(box.offset, box.size, strict=True)):
        place = torch.arange(start, start + length).view([-1 if d == dimension else 1 for d in range(flat.dim())])
        flat = flat * box.shape[dimension] + place
    return flat


def give_gradients(trunk, step: int) -> None:
    """A function of name, global position and step; every fifth step's is far larger than those before it."""
    for piece in pieces(trunk):
        for box in piece.cut(piece.key, piece.parameter.main_grad.view(-1), 0):
            values = torch.sin((_positions(box) % 9973).double() * 0.7 + step * 1.3 + sum(box.key.encode()))
            box.values.copy_(values * (0.3 if step % 5 == 4 else 0.001))


def updated(topology, steps: int, settings: OptimizerSettings, **model):
    """(trunk, optimizer) after so many updates with `give_gradients`."""
    trunk, optimizer = make(topology, settings=settings, **model)
    for step in range(steps):
        give_gradients(trunk, step)
        set_learning_rate(optimizer, 0.01 * (1 + step))
        update(optimizer, gradient_norm(optimizer))
    return trunk, optimizer


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

