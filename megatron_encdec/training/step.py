"""One optimizer step, and one evaluation, over a global batch.

    1. `regrouped`            the sample numbers of this data-parallel rank, micro-batch by micro-batch, each of one
                              attention kind (`share_of_batch`: of the samples of one kind)
    2. `micro_batches`        sample -> objective -> arrays, one micro-batch at a time (`staged`: a thread may be ahead)
    3. `Trainer.train_step`   forward, backward, reduction; gradient norm; update, where loss and norm are finite
    4. `Trainer.evaluate`     forward only, on fixed samples

The loss is the sum over the labelled tokens of the whole global batch over their number (or over the weight that the
objective gives), whatever the micro-batches hold, and so is the gradient (megatron.core divides by the summed counts).
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megatron_encdec.data.samples import Samples
from megatron_encdec.engine import optimizer as updates
from megatron_encdec.model.flops import attended_pairs
from megatron_encdec.model.rope import Rope
from megatron_encdec.objectives.base import AttentionKind, MicroBatch, Objective, Vocabulary, collate, filler
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device, device_type
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.platform.watchdog import mark
from megatron_encdec.training.work import Work

_ARRAYS = ("inputs_BS", "label_positions_N", "labels_N", "weights_N", "cu_seqlens")
Share = Sequence[int | None]  # sample numbers of one micro-batch, a range where nothing is regrouped; None: filler


@dataclass(frozen=True)
class StepResult:
    """What a step measured; `loss` is None where nothing was labelled. targets: labelled tokens. pairs:
    `attended_pairs` of the global batch."""

    loss: float | None
    targets: int
    pairs: tuple[float, float] = (0.0, 0.0)
    grad_norm: float | None = None
    samples: range = range(0)
    seconds_waited: float = 0.0  # by this rank, for micro-batches that were not ready
    bad: tuple[tuple[int, int, Share], ...] = ()  # this rank's non-finite micro-batches: rank, number, samples
    gradients: "BadGradients | None" = None  # this rank's, where the loss is finite

    @property
    def loss_is_finite(self) -> bool:
        """Also where nothing was labelled."""
        return math.isfinite(self.loss or 0.0)

    @property
    def finite(self) -> bool:
        """Whether the update was made."""
        return self.loss_is_finite and math.isfinite(self.grad_norm or 0.0)


@dataclass(frozen=True)
class BadGradients:
    """Parameters whose gradient is not finite on `rank`, in the order of the forward pass: `own` ones it made itself,
    `summed` ones stand in its part of the sum over data-parallel ranks of one `place` (pipeline and tensor rank)."""

    rank: int
    place: tuple[int, int]
    own: tuple[str, ...]
    summed: tuple[str, ...]


def share_of_batch(numbers: Sequence[int], micro_size: int, topology: Topology, equal: bool = False) -> list[Share]:
    """Of the sample `numbers` those of this rank, a share a micro-batch; as many on every rank. Where they do not fill
    the last micro-batches of all ranks, these are smaller (`equal`: as large), and what is still free is filler."""
    shares, all_ranks = [], topology.data * micro_size
    for start in range(0, len(numbers), all_ranks):
        size = micro_size if equal else min(micro_size, -(-(len(numbers) - start) // topology.data))
        first = start + topology.data_rank * size
        mine = numbers[first:first + size]
        shares.append(mine if len(mine) == size else (*mine, *[None] * (size - len(mine))))
    return shares


def regrouped(objective: Objective, data_seed: int, numbers: range, micro_size: int, topology: Topology,
              equal: bool = False) -> list[Share]:
    """The shares of a global batch in which a micro-batch has one attention kind: kind after kind, samples in order."""
    kinds: dict[AttentionKind, list[int]] = {}
    for number in numbers:
        kinds.setdefault(objective.of_sample(data_seed, number).attention, []).append(number)
    groups = [numbers] if len(kinds) < 2 else [kinds[kind] for kind in sorted(kinds)]
    return [share for group in groups for share in share_of_batch(group, micro_size, topology, equal)]


def named(share: Share) -> str:
    """For people: `4..7` where numbers follow one another, else `4, 6, 9`; filler has none."""
    numbers = [number for number in share if number is not None]
    if numbers and numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers)) or "(filler)"


def micro_batches(samples: Samples, objective: Objective, vocabulary: Vocabulary,
                  shares: Sequence[Share]) -> Iterator[MicroBatch]:
    empty = filler(samples.sequence_length)
    for share in shares:
        mark(f"reading samples {named(share)}")
        batch = collate(objective, [empty if index is None else samples.sample(index) for index in share],
                        samples.seed, vocabulary)
        mark(f"computing samples {named(share)}")
        yield batch


class Staged:
    """A micro-batch whose arrays can be had as tensors on the device; from pinned memory the copy waits for nobody."""

    def __init__(self, batch: MicroBatch):
        self.batch = batch
        self._host = {name: torch.from_numpy(array) for name in _ARRAYS if (array := getattr(batch, name)) is not None}
        if device_type() == "cuda":
            self._host = {name: tensor.pin_memory() for name, tensor in self._host.items()}

    def tensor(self, name: str) -> torch.Tensor | None:
        """The array `name` on this rank's device; None where there is none."""
        return self._host[name].to(device(), non_blocking=True) if name in self._host else None


@contextlib.contextmanager
def staged(batches: Iterator[MicroBatch], ahead: int) -> Iterator[Iterator[Staged]]:
    """`batches`, up to `ahead` of them prepared by a thread (0: each when it is asked for, without a thread).
    Their order and content do not depend on `ahead`: one thread draws from one iterator, and nothing that belongs to a
    later step. What goes wrong while one is prepared is raised where it is asked for."""
    if ahead == 0:
        yield map(Staged, batches)
        return

    def begin() -> None:
        if device_type() == "cuda":
            torch.cuda.set_device(device())  # pinned memory belongs to a device's context

    def prepare() -> Staged | None:
        batch = next(batches, None)
        return None if batch is None else Staged(batch)

    def ready() -> Iterator[Staged]:
        while True:
            mark("waiting for the next micro-batch")
            one = pending.popleft().result()
            if one is None:
                return
            pending.append(thread.submit(prepare))
            mark(f"computing samples {named(one.batch.samples)}")
            yield one

    thread = ThreadPoolExecutor(1, "micro-batches", begin)
    try:
        pending = deque(thread.submit(prepare) for _ in range(ahead))
        yield ready()
    finally:
        thread.shutdown(cancel_futures=True)


def _forward(batches: Iterator[Staged], model, rope: Rope | None):
    """megatron.core's forward_step_func: one micro-batch through this stage, and how its loss is summed."""
    ready = next(batches)
    batch = ready.batch
    trunk = mcore.unwrap_model(model)
    windows, length = batch.inputs_BS.shape
    context = trunk.attention_context(batch.attention, ready.tensor("cu_seqlens"), batch.longest, batch.isolated,
                                      windows, length, rope)
    output = model(ready.tensor("inputs_BS"), context, ready.tensor("label_positions_N"), ready.tensor("labels_N"),
                   summed=True, weights_N=ready.tensor("weights_N"))
    cuts = batch.cu_seqlens[batch.cu_seqlens <= len(batch.samples) * length]  # without filler
    return output, partial(_sums, weight=batch.weight, count=len(batch.labels_N),
                           pairs=attended_pairs(cuts, batch.attention, trunk.model.sliding_window))


def _sums(total, weight: int, count: int, pairs: np.ndarray):
    """(sum to differentiate, what to divide by, what to report). No number is copied to the device and waited for."""
    divisor = torch.full((), weight, dtype=torch.int, device=total.device)
    reported = torch.full((5,), pairs[0], dtype=torch.double, device=total.device)
    reported[4].fill_(pairs[1])
    reported[2].fill_(count)
    reported[1].fill_(weight)
    reported[0].copy_(total.detach())
    return total, divisor, reported


class Trainer:
    """The trunk, its optimizer, and the two things done with them."""

    def __init__(self, ddp, optimizer, topology: Topology, vocabulary: Vocabulary, ahead: int = 0,
                 fp8_evaluation: bool = False):
        """ahead: micro-batches that a thread prepares while the device computes."""
        self.ddp, self.optimizer, self.topology, self.vocabulary = ddp, optimizer, topology, vocabulary
        self._ahead, self._fp8_evaluation = ahead, fp8_evaluation
        self._waited = 0.0  # seconds, in the step at hand

    @property
    def trunk(self):
        return mcore.unwrap_model(self.ddp)

    def train_step(self, work: Work, lr: float) -> StepResult:
        """One update with the windows of `work`; none where loss or gradient norm is not finite."""
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        updates.set_learning_rate(self.optimizer, lr)
        sums = self._run(work, forward_only=False)
        totals_5 = self._reduce(sums)
        mark(f"updating the weights with samples {work.numbers.start}..{work.numbers.stop - 1}")
        norm = updates.gradient_norm(self.optimizer)  # the device has been waited for: the loss costs no second wait
        result = replace(_result(totals_5), grad_norm=norm, samples=work.numbers, seconds_waited=self._waited)
        if result.finite:
            updates.update(self.optimizer, norm)
            return result
        gradients = self._bad_gradients() if result.loss_is_finite else None
        return replace(result, bad=self._bad(sums, self._shares(work)), gradients=gradients)

    @torch.no_grad()
    def evaluate(self, work: Work) -> StepResult:
        """Mean loss over the targets of `work`; in bf16, unless told otherwise, also with FP8."""
        self.ddp.eval()
        updates.whole_parameters(self.ddp)
        with contextlib.nullcontext() if self._fp8_evaluation else self.trunk.without_fp8():
            return _result(self._reduce(self._run(work, forward_only=True)))

    def _run(self, work: Work, forward_only: bool) -> list[torch.Tensor]:
        shares, self._waited = self._shares(work), 0.0
        length, packed = work.samples.sequence_length, self.trunk.packed
        ahead = min(self._ahead, len(shares))
        with staged(micro_batches(work.samples, work.objective, self.vocabulary, shares), ahead) as batches:
            return mcore.get_forward_backward_func()(
                forward_step_func=partial(_forward, rope=work.rope), data_iterator=self._timed(batches),
                model=[self.ddp], num_microbatches=len(shares), forward_only=forward_only,
                seq_length=length * work.micro_size if packed else length,
                micro_batch_size=1 if packed else work.micro_size)

    def _timed(self, batches: Iterator[Staged]) -> Iterator[Staged]:
        """`batches`, and how long each was waited for."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _shares(self, work: Work) -> list[Share]:
        equal = self.topology.pipeline > 1 or self.trunk.config.tp_comm_overlap  # both are planned for one shape
        return regrouped(work.objective, work.samples.seed, work.numbers, work.micro_size, self.topology, equal)

    def _bad(self, sums: list[torch.Tensor], shares: list[Share]) -> tuple[tuple[int, int, Share], ...]:
        """Which micro-batches of this rank have a loss that is not finite; told once a data-parallel rank."""
        if self.topology.tensor_rank:
            return ()
        return tuple((self.topology.rank, number, shares[number]) for number, sum_5 in enumerate(sums)
                     if not math.isfinite(float(sum_5[0])))

    def _bad_gradients(self) -> BadGradients:
        topology, found = self.topology, updates.nonfinite_gradients(self.trunk, self.optimizer)
        own, summed = (tuple(name for name, mine in found if (mine or topology.data == 1) == wanted)
                       for wanted in (True, False))
        return BadGradients(topology.rank, (topology.pipeline_rank, topology.tensor_rank), own, summed)

    def _reduce(self, sums: list[torch.Tensor]) -> torch.Tensor:
        """Sums [5] of the last stage over all data-parallel ranks, on every rank; not waited for."""
        state = mcore.parallel_state
        total_5 = torch.stack(sums).sum(dim=0) if sums else torch.zeros(5, dtype=torch.double, device=device())
        if self.topology.data > 1:
            dist.all_reduce(total_5, group=state.get_data_parallel_group())
        if self.topology.pipeline > 1:
            dist.broadcast(total_5, state.get_pipeline_model_parallel_last_rank(),
                           group=state.get_pipeline_model_parallel_group())
        return total_5


def _result(totals_5: torch.Tensor) -> StepResult:
    loss_sum, weight, targets, *pairs = totals_5.tolist()
    return StepResult(loss_sum / weight if targets else None, int(targets), tuple(pairs))
