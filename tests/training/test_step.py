"""A global batch is the same samples, inputs and masks however it is spread over ranks and micro-batches."""

import numpy as np
import pytest

from megatron_encdec.data.config import DataConfig, SourceConfig
from megatron_encdec.data.samples import Samples
from megatron_encdec.objectives.base import Objective, Vocabulary
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.training.step import micro_batches, share_of_batch


def rows_by_sample(samples, objective, data_size, micro_size, first=24, global_size=12):
    """Sample number -> (inputs, labelled positions, labels), over all data-parallel ranks."""
    rows = {}
    for data_rank in range(data_size):
        topology = Topology(data_size, data_rank, 1, 1, data_size, 0, 0, data_rank)
        shares = share_of_batch(range(first, first + global_size), micro_size, topology)
        for batch in micro_batches(samples, objective, Vocabulary(301, frozenset(range(8)), 1), shares):
            length = batch.inputs_BS.shape[1]
            for row, index in enumerate(batch.samples):
                mine_N = batch.label_positions_N // length == row
                assert index not in rows
                rows[index] = (batch.inputs_BS[row], batch.label_positions_N[mine_N] % length, batch.labels_N[mine_N])
    return rows


@pytest.mark.parametrize("objective", ["clm", "mlm:0.4"])
def test_same_masks_on_another_topology(root, objective):
    samples = Samples(DataConfig([SourceConfig(str(root / "text"))], sequence_length=64))
    objective = Objective.from_yaml(objective, "objective")
    alone = rows_by_sample(samples, objective, 1, 12)
    assert sorted(alone) == list(range(24, 36))
    for data_size, micro_size in ((1, 2), (2, 3), (3, 1), (4, 3)):
        spread = rows_by_sample(samples, objective, data_size, micro_size)
        assert spread.keys() == alone.keys()
        for index, arrays in spread.items():
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(arrays, alone[index], strict=True))
