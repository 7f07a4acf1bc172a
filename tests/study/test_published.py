"""The paper's figures: how many there are, and under which names."""

import pytest

from megatron_encdec.study.curves import parse
from megatron_encdec.study.published import AVERAGES, CELLS, dataset_name


def test_table_of_averages():
    assert len(AVERAGES) == 15 + 4 + 9 + 6  # base, shorter budgets without a switch, splits, continued
    assert AVERAGES["610m-clm-10k-mlm40-42k"] == {"SC": 87.85, "TC": 93.07, "QA": 67.77, "IR": 79.88}
    assert AVERAGES["210m-mlm50-42k"]["IR"] == 77.04 and AVERAGES["1b-clm-42k"]["SC"] == 82.68
    assert AVERAGES["610m-clm-dec42k-mlm40-64k"]["SC"] == 88.40
    assert AVERAGES["610m-mlm40-12k"]["QA"] == 41.51 and AVERAGES["610m-clm-22k"]["IR"] == 75.71
    assert CELLS["610m-clm-42k", "SST-2"] == 91.10
    assert all(parse(name) for name in AVERAGES)


def test_biphasic_beats_mlm_alone_where_the_paper_says_so():
    """25 / 75 beats MLM alone at every budget, but on retrieval at 22k steps."""
    for total, clm in ((12, 3), (22, 5), (42, 10)):
        ours, alone = AVERAGES[f"610m-clm-{clm}k-mlm40-{total}k"], AVERAGES[f"610m-mlm40-{total}k"]
        assert [family for family in ours if ours[family] <= alone[family]] == (["IR"] if total == 22 else [])


@pytest.mark.parametrize(("place", "name"), [
    (("SC", "sst2"), "SST-2"), (("SC", "SST-2"), "SST-2"), (("SC", "mnli"), "MNLI"), (("QA", "squad_v2"), "SQuAD-v2"),
    (("QA", "squad"), "SQuAD"), (("IR", "msmarco", "msmarco_pairs"), "MS MARCO"), (("IR", "nq", "own"), None),
    (("TC", "sst2"), None), (("SC", "reviews"), None),
])
def test_names_of_datasets(place, name):
    assert dataset_name(*place) == name
