"""What changes nothing in a run through NeMo's recipes: a second time, a causal export, micro-batches, ranks.

In a file of its own, so that two processes share NeMo's tests.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from finetune_sets import losses, record_of, run_of, run_one, write_rows

pytestmark = pytest.mark.nemo


def test_again_in_one_process_and_from_a_causal_export(root):
    """The same run gives the same bits; a Llama with the same weights is the same bidirectional encoder."""
    first, again, llama = (run_of(root, "SC", name, model, steps=8)
                           for name, model in (("a", "euro"), ("b", "euro"), ("c", "llama")))
    results = run_one(first)
    assert run_one(again) == results and run_one(llama) == results
    assert losses(again) == losses(first) and losses(llama) == losses(first)


def test_micro_batches_of_retrieval_change_nothing(root):
    """Cached gradients are those of the whole batch at once."""
    runs = [run_of(root, "IR", f"micro_{size}", steps=6, retrieval_micro_batch_size=size, shared=True)
            for size in (3, 16)]
    scores = [run_one(run)["validation"]["score"] for run in runs]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-4)
    assert scores[0] == pytest.approx(scores[1], abs=0.07)
    records = [record_of(run) for run in runs]
    assert records[0]["queries"] == 96 and records[0]["positives"] == records[0]["train_features"] == 192
    assert records[0]["masked_negatives"] == records[1]["masked_negatives"] > 6 * 4


def test_a_document_that_answers_the_query_is_no_negative(root):
    """Of queries that share their one document the loss is 0, not the logarithm of their number."""
    run = run_of(root, "IR", "same", steps=2, batch_size=4, retrieval_micro_batch_size=2)
    train = write_rows(root / "same.jsonl", [{"query": f"query {number}", "positive": "the answer"}
                                             for number in range(8)])
    same = replace(run, dataset=replace(run.dataset, name="same", train=str(train)))
    run_one(same)
    assert list(losses(same).values()) == [0.0, 0.0]
    record = record_of(same)
    assert (record["queries"], record["positives"], record["masked_negatives"]) == (8, 8, 2 * 4 * 3)


@pytest.mark.parametrize("family", ["IR", *(pytest.param(one, marks=pytest.mark.slow) for one in ("SC", "TC", "QA"))])
def test_two_ranks_are_one(root, family):
    """By NeMo's own application, from the YAML that a run on one rank left."""
    from megatron_encdec.finetune.run import prepare_files

    one = run_of(root, family, "one", steps=6, shared=family == "IR")
    expected = run_one(one)
    two = replace(one, results=str(root / "two"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend",
         "c10d", "--rdzv-endpoint", "localhost:0", "-m", "nemo_automodel.cli.app", str(prepare_files(two, ranks=2))],
        text=True, capture_output=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((two.directory / "results.json").read_text())
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    assert found["validation"]["score"] == pytest.approx(expected["validation"]["score"], abs=0.07)
    assert record_of(two)["ranks"] == 2
    assert record_of(one).get("masked_negatives") == record_of(two).get("masked_negatives")
