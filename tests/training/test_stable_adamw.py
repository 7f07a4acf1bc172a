"""A run with StableAdamW and parameters without decay goes on exactly, and comes out the same on two ranks."""

import pytest
from small_run import metrics, outcome

OPTIONS = ("optimizer.name=stable_adamw", "optimizer.no_decay=[norms, embeddings]", "optimizer.clip_grad=0")


def test_resumes_exactly_and_agrees_on_two_ranks(pretrain):
    two = (*OPTIONS, "--nproc", "2")
    whole = pretrain("whole", *two)
    pretrain("stopped", *two, "--until", "4")
    assert outcome(pretrain("stopped", *two)) == outcome(whole)
    alone, split = metrics(pretrain("alone", *OPTIONS)), metrics(pretrain("split", *two, "parallel.tensor=2"))
    for ours, theirs, expected in zip(metrics(whole), split, alone, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert theirs["loss"] == pytest.approx(expected["loss"], rel=1e-4)
