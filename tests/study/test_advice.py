"""`study advise`: the paper's numbers, one's own, and what neither knows."""

import pytest
from result_trees import write_grid

from megatron_encdec.cli import main


def test_the_papers_advice(capsys):
    assert main(["study", "advise", "--size", "610m", "--budget", "100B"]) == 0
    said = capsys.readouterr().out
    assert "CLM share of the steps, % (610m clm → mlm40, 42k steps; 99.1G tokens)" in said
    share, ratio = said.split("mask ratio, %")
    assert "87.85           93.07           67.77           79.88           82.14  <- best" in share
    assert "try 24" in share and "try 50; 20, 40 lie within half a point" in ratio
    assert "prints no intervals" in said and "not known at" not in said


def test_what_the_paper_does_not_know_is_said(capsys):
    assert main(["study", "advise", "--size", "210m", "--budget", "500M"]) == 0
    said = capsys.readouterr().out
    assert "not known at 210m: this is 610m" in said and "not known at 500M tokens: this is 28.3G" in said


def test_ones_own_results(tmp_path, capsys):
    for model, score in (("tiny-mlm40-4k", 0.6), ("tiny-clm-1k-mlm40-4k", 0.7), ("tiny-clm-4k", 0.5)):
        write_grid(tmp_path, f"{model}/SC/toy", {1e-5: [score, score + 0.01], 1e-4: [0.4, 0.41]})
    assert main(["study", "advise", "--size", "tiny", "--budget", "9437184000", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "70.50 ± 0.98" in said and "try 25" in said and "1e-05 100%" in said
    assert "mask ratio, %: no models that differ in it alone" in said and "not known" not in said


@pytest.mark.parametrize("options, says", [
    (["--size", "70b", "--budget", "1B"], "--size: '70b' is not one of"),
    (["--size", "610m", "--budget", "much"], "--budget much: a number of tokens"),
    (["--size", "610m", "--budget", "-1B"], "--budget -1B: a number of tokens")])
def test_mistakes(options, says, capsys):
    assert main(["study", "advise", *(["=".join(options[:2]), "=".join(options[2:])])]) == 2
    assert says in capsys.readouterr().err
