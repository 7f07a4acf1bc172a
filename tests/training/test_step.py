"""A global batch is the same samples, inputs and masks however it is spread over ranks and micro-batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_encdec.data.config import DataConfig, SourceConfig
from megatron_encdec.data.samples import Samples
from megatron_encdec.objectives.base import Objective, Vocabulary
from megatron_encdec.objectives.clm import CLM
from megatron_encdec.objectives.mixture import Mixture, Part
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.platform.distributed import Topology
from megatron_encdec.training.step import micro_batches, named, regrouped, share_of_batch


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


MIXED = {"name": "mixture", "parts": [{"objective": "clm", "weight": 1}, {"objective": "mlm", "weight": 3}]}


def topology_of(data_rank, data_size):
    return Topology(data_size, data_rank, 1, 1, data_size, 0, 0, data_rank)


@given(first=st.integers(0, 10_000), global_size=st.integers(1, 60), data_size=st.integers(1, 5),
       micro_size=st.integers(1, 7), weight=st.sampled_from([0.01, 1, 100]), equal=st.booleans())
@settings(deadline=None)
def test_a_step_holds_each_sample_once_in_micro_batches_of_one_kind(first, global_size, data_size, micro_size, weight,
                                                                    equal):
    objective = Mixture((Part(CLM(), weight), Part(MLM())))
    numbers = range(first, first + global_size)
    ranks = [regrouped(objective, 4, numbers, micro_size, topology_of(rank, data_size), equal)
             for rank in range(data_size)]
    found = [number for shares in ranks for share in shares for number in share if number is not None]
    assert sorted(found) == list(numbers)
    kinds = {number: objective.of_sample(4, number).attention for number in numbers}
    for together in zip(*ranks, strict=True):  # as many micro-batches on every rank, of one kind and size
        assert len({kinds[number] for share in together for number in share if number is not None}) == 1
        assert len({len(share) for share in together}) == 1
        assert all(None not in list(share)[:sum(number is not None for number in share)] for share in together)
        filled = sum(number is None for share in together for number in share)
        assert filled < (data_size * micro_size if equal else data_size)
        assert len(together[0]) == micro_size or (not equal and len(together[0]) < micro_size)


def test_what_needs_no_regrouping_is_as_it_was():
    parts = Mixture((Part(MLM(0.2)), Part(MLM(0.4))))
    for objective in (CLM(), MLM(), parts):
        shares = regrouped(objective, 4, range(24, 36), 2, topology_of(1, 3))
        assert shares == [range(26, 28), range(32, 34)]


def test_a_mixture_is_the_same_on_another_topology(root):
    samples = Samples(DataConfig([SourceConfig(str(root / "text"))], sequence_length=64))
    objective, vocabulary = Objective.from_yaml(MIXED, "objective"), Vocabulary(301, frozenset(range(8)), 1)
    alone = {}
    for index in range(24, 36):
        own = objective.of_sample(samples.seed, index)
        alone[index] = own.attention, own.apply(samples.sample(index), samples.seed, vocabulary)
    assert {kind for kind, _ in alone.values()} == {"causal", "bidirectional"}
    for data_size, micro_size, equal in ((1, 12, False), (1, 5, True), (2, 3, False), (4, 2, True)):
        for rank in range(data_size):
            shares = regrouped(objective, samples.seed, range(24, 36), micro_size, topology_of(rank, data_size), equal)
            for batch in micro_batches(samples, objective, vocabulary, shares):
                for row, index in enumerate(batch.samples):
                    kind, labelled = alone[index]
                    assert batch.attention == kind and (batch.inputs_BS[row] == labelled.inputs_S).all()


@pytest.mark.parametrize("share, text", [(range(4, 8), "4..7"), ((3,), "3..3"), ((3, 5, None), "3, 5"),
                                         ((6, 7, None), "6..7"), ((None,), "(filler)")])
def test_samples_are_named_one_by_one_where_they_do_not_follow_one_another(share, text):
    assert named(share) == text
