"""What becomes of examples before and after the model: batches of retrieval, windows of questions."""

from dataclasses import replace

import numpy as np
import pytest
from finetune_sets import run_of, write_rows

from megatron_encdec.finetune.features import load_task
from megatron_encdec.platform.errors import UserError


def with_rows(run, root, name, rows, **keys):
    """`run` on a dataset called `name` that trains on `rows`."""
    train = str(write_rows(root / f"{name}.jsonl", rows))
    return replace(run, dataset=replace(run.dataset, name=name, train=train, **dict.fromkeys(keys, train)))


def test_positives_of_one_query_in_several_rows(root):
    rows = [{"query": "a", "positive": ["one", "two"]}, {"query": "a", "positive": "three"},
            {"query": "b", "positive": ["two", "two"]}]
    task = load_task(with_rows(run_of(root, "IR"), root, "rows", rows, test=True))
    assert [(one["document"], one["positives"]) for one in task.train] == [
        (0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1, 2]), (1, [1])]
    batch = task.collate(task.train)
    assert batch["positives"].tolist() == [[0, 1, 2]] * 3 + [[1, -1, -1]] and len(batch["document_input_ids"]) == 4
    scores = task.score("test", [*np.eye(3)[[0, 2, 2]], *np.eye(3)])["scores_i"]
    assert scores[:2] == [1.0, 1.0] and scores[2] < 1.0  # a: all three documents answer it, whichever row asks


@pytest.mark.parametrize(("words", "others", "cut"), [(8, 8, 2), (30, 30, 2), (30, 1, 1), (4, 10, 1), (4, 9, 0)])
def test_each_text_of_a_pair_that_was_cut_is_counted_once(root, words, others, cut):
    text, pair = " ".join(["river"] * words), " ".join(["stone"] * others)
    rows = [{"text": text, "text_pair": pair, "label": label} for label in ("yes", "no")]
    run = with_rows(run_of(root, "SC", max_length=14), root, "pairs", rows, test=True, validation=True)
    task = load_task(run)
    whole = [len(task.tokenizer(one, add_special_tokens=first)["input_ids"])
             for one, first in ((text, True), (pair, False))]
    assert len(task.train[0]["ids"]) == min(sum(whole) + 1, 14)
    assert task.counts["cut_texts"] == 2 * cut


def test_a_question_whose_answer_no_window_holds_is_left_out_and_counted(root):
    run = run_of(root, "QA", max_length=8)
    context = " ".join(["river stone cloud light"] * 8)
    rows = [{"question": "which city?", "context": context, "answers": [context[:5]]},
            {"question": "which city?", "context": context, "answers": [context]},
            {"question": "which city?", "context": context, "answers": []}]
    task = load_task(with_rows(run, root, "windows", rows, validation=True))
    assert {feature["example"] for feature in task.train} == {0, 2} and task.counts["answers_in_no_window"] == 1
    assert {feature["example"] for feature in task.features("validation")} == {0, 1, 2}
    with pytest.raises(UserError, match="no window of 8 tokens holds the answer.*training.max_length"):
        load_task(with_rows(run, root, "alone", rows[1:2] * 2))


def test_the_last_tasks_are_kept_until_a_file_changes(root):
    runs = [run_of(root, family) for family in ("SC", "TC", "QA")]
    first = load_task(runs[0])
    assert load_task(replace(runs[0], lr=1.0, seed=7)) is first
    load_task(runs[1])
    assert load_task(runs[0]) is first
    load_task(runs[2])
    assert load_task(runs[0]) is first
    with_rows(runs[0], root / "SC", "train", [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}])
    assert len(load_task(runs[0]).train) == 2
