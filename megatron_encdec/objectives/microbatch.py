"""Several labelled windows as the arrays one forward pass reads.

Legend: B windows of the micro-batch, S tokens of a window, N labelled positions of all windows (may be 0),
E segments of all windows. A flat position is b * S + s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import AttentionKind, Objective, Vocabulary


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What a micro-batch carries, its attention kind included.

    `inputs_BS`, `label_positions_N` (flat, ascending), `labels_N`: int64. `cu_seqlens` (int32, E + 1): flat
    starts of the segments and the end B * S, as variable-length attention kernels take them. `longest`:
    tokens of the longest segment. `isolated`: some window has more than one segment, so that attention
    needs `cu_seqlens`. `samples`: sample numbers, B of them."""

    inputs_BS: np.ndarray
    label_positions_N: np.ndarray
    labels_N: np.ndarray
    cu_seqlens: np.ndarray
    longest: int
    isolated: bool
    attention: AttentionKind
    samples: tuple[int, ...]


def collate(objective: Objective, samples: Sequence[Sample], data_seed: int, vocabulary: Vocabulary) -> MicroBatch:
    """Apply `objective` to `samples` (at least one, of equal length) and lay them end to end."""
    labelled = [objective.apply(sample, data_seed, vocabulary) for sample in samples]
    inputs_BS = np.stack([one.inputs_S for one in labelled])
    starts_B = np.arange(len(samples)) * inputs_BS.shape[1]
    ends_E = np.concatenate([start + sample.segment_ends_E
                             for start, sample in zip(starts_B, samples, strict=True)])
    cu_seqlens = np.concatenate([[0], ends_E]).astype(np.int32)
    return MicroBatch(
        inputs_BS=inputs_BS,
        label_positions_N=np.concatenate([start + one.positions_N
                                          for start, one in zip(starts_B, labelled, strict=True)]),
        labels_N=np.concatenate([one.labels_N for one in labelled]),
        cu_seqlens=cu_seqlens,
        longest=int(np.diff(cu_seqlens).max()),
        isolated=len(ends_E) > len(samples),
        attention=objective.attention,
        samples=tuple(sample.index for sample in samples),
    )
