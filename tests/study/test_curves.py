"""Which models form a curve."""

import pytest

from megatron_encdec.study.curves import Stage, curves, parse, ratios, shares, short_steps
from megatron_encdec.study.published import AVERAGES
from megatron_encdec.study.results import ModelRecord


def test_names_of_the_paper():
    name = parse("610m-clm-10k-mlm40-42k")
    assert name.prefix == "610m" and name.stages == (Stage("clm", 10_000, False), Stage("mlm40", 42_000, False))
    assert name.steps == 42_000 and name.share == pytest.approx(10 / 42)
    continued = parse("610m-clm-dec42k-mlm40-64k")
    assert continued.stages[0].decayed and continued.share is None
    assert parse("clm-500").stages == (Stage("clm", 500, False),)
    assert parse("610m-clm-42k").share == 1.0 and parse("610m-mlm40-42k").share == 0.0


@pytest.mark.parametrize("name", ["bert-base", "610m", "610m-clm-42k-mlm40-10k", "", "mlm", "610m-clm-42k-extra"])
def test_other_names(name):
    assert parse(name) is None


def test_curves_of_the_paper():
    found = curves(AVERAGES, {})
    assert found["610m clm 25 % → mlm40"] == [(12_000, "610m-clm-3k-mlm40-12k"), (22_000, "610m-clm-5k-mlm40-22k"),
                                              (42_000, "610m-clm-10k-mlm40-42k")]
    assert [step for step, _ in found["610m mlm40"]] == [12_000, 22_000, 42_000]
    assert [step for step, _ in found["610m clm decayed 42k → mlm40"]] == [44_000, 54_000, 64_000]
    assert len(found) == 7


def test_checkpoints_of_one_run():
    assert curves(["x-clm-1k-mlm40-2k", "x-clm-1k-mlm40-4k", "x-clm-1k-mlm40-5k"], {}) == {
        "x clm 1k → mlm40": [(2000, "x-clm-1k-mlm40-2k"), (4000, "x-clm-1k-mlm40-4k"), (5000, "x-clm-1k-mlm40-5k")]}
    assert curves(["run@100", "run@20", "other"], {}) == {"run": [(20, "run@20"), (100, "run@100")]}
    assert list(curves(["r-step_100", "r-step_20"], {})) == ["r"]
    assert curves(["a-100", "b-100"], {}) == {}


def test_records_say_more_than_names():
    records = {"first": ModelRecord(10, ("demo",)), "second": ModelRecord(5, ("demo",))}
    assert curves(["first", "second"], records) == {"demo": [(5, "second"), (10, "first")]}


def test_what_a_run_did_counts_and_not_its_models_name():
    def record(*phases, total=42_000):
        return ModelRecord(phases[-1][1], (), {"size": "610m", "seed": 3, "total": total, "phases": [
            {"name": name, "end": end, "decayed": end == total} for name, end in phases]})

    records = {"a": record(("mlm40", 42_000)), "b": record(("clm", 10_000), ("mlm40", 42_000)),
               "c": record(("clm", 42_000)), "d": record(("clm", 10_000), ("mlm40", 20_000)),
               "e": record(("mlm20", 42_000)), "f-s3": record(("mlm20", 42_000))}
    assert shares(records, records) == {
        "610m clm → mlm40, 42k steps": [(0.0, "a"), (100 * (10_000 / 42_000), "b"), (100.0, "c")]}  # d is on its way
    assert ratios(records, records) == {"610m mlm, 42k steps": [(20.0, "e"), (40.0, "a")]}
    assert curves(["b", "d"], records) == {"610m clm 10k → mlm40": [(20_000, "d"), (42_000, "b")]}


def test_ratios_of_the_paper():
    found = ratios(AVERAGES)
    assert list(found) == ["1b mlm, 42k steps", "210m mlm, 42k steps", "610m mlm, 42k steps"]
    assert [ratio for ratio, _ in found["610m mlm, 42k steps"]] == [20, 30, 40, 50]


def test_shares_of_the_paper():
    found = shares(AVERAGES)
    assert list(found) == [f"610m clm → mlm40, {total} steps" for total in ("12k", "22k", "42k")]
    assert [share for share, _ in found["610m clm → mlm40, 12k steps"]] == [0, 25, 50, 75, 100]
    assert found["610m clm → mlm40, 42k steps"][0][1] == "610m-mlm40-42k"  # not mlm20, mlm30, mlm50


def test_short_steps():
    assert [short_steps(count) for count in (42_000, 2_500, 800, 1_234)] == ["42k", "2.5k", "800", "1234"]
