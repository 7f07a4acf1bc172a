"""Baselines by libraries, beside their formulas."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from finetune_sets import run_of

from megatron_encdec.finetune.baselines import ensure_baselines
from megatron_encdec.finetune.bm25 import best_by_bm25, words_of
from megatron_encdec.finetune.features import load_task

pytestmark = pytest.mark.nemo  # scikit-learn and bm25s are in that environment


def okapi(queries, documents):
    """Scores [queries][documents] by the formula, with Lucene's idf, k1 = 1.2, b = 0.75."""
    counts = [Counter(words_of(text)) for text in documents]
    average = sum(one.total() for one in counts) / len(counts)
    having = Counter(word for one in counts for word in one)
    return np.array([[sum(
        math.log(1 + (len(documents) - having[word] + 0.5) / (having[word] + 0.5)) * one[word]
        / (one[word] + 1.2 * (0.25 + 0.75 * one.total() / average)) for word in words_of(query)) for one in counts]
        for query in queries])


def test_baselines_of_other_files_are_made_anew_and_those_of_others_kept(root):
    run = run_of(root, "SC", "baselines")
    path = root / "baselines/baselines/SC/toy.json"
    ensure_baselines(run, load_task(run))
    first = path.read_text()
    ensure_baselines(run, load_task(run))
    assert path.read_text() == first
    with open(run.dataset.test, "a") as file:
        file.write(json.dumps({"text": "good river", "label": "yes"}) + "\n")
    ensure_baselines(run, load_task(run))
    assert path.read_text() != first
    path.write_text('{"baselines": {"by hand": {"test": {"score": 0.5}}}}')
    ensure_baselines(run, load_task(run))
    assert "by hand" in path.read_text()


def test_bm25_is_its_formula():
    draw = random.Random(0)
    words = [f"w{number}" for number in range(60)]
    documents = [" ".join(draw.choices(words, weights=range(1, 61), k=draw.randrange(3, 40))) for _ in range(300)]
    queries = [" ".join(draw.choices(words, k=5)) for _ in range(40)] + ["W1 w1, w2!", "nowhere", ""]
    for found, scores in zip(best_by_bm25(queries, documents, 10), okapi(queries, documents), strict=True):
        assert len(set(found)) == 10
        assert scores[found] == pytest.approx(np.sort(scores)[::-1][:10], abs=1e-5)  # bm25s counts in fp32
    assert best_by_bm25(["nowhere"], documents, 10)[0] == list(range(10))
