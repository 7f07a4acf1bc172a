"""Windows in words: what is marked, and that nothing else of the text changes."""

import io
import random
import re

import numpy as np
import pytest
import sentencepiece

from megatron_encdec.data.samples import Sample
from megatron_encdec.inspection.windows import END_OF_DOCUMENT, indented, marks_of, show
from megatron_encdec.objectives.base import Objective, Vocabulary
from megatron_encdec.text.tokenizer import load_tokenizer

TEXT = "the small cat likes the old house, and paints — älter — a warm stone"


@pytest.fixture(scope="module", params=["tokenizer.json", "sentencepiece"])
def tokenizer(request, workspace):
    if request.param == "tokenizer.json":
        return load_tokenizer(workspace / "tokenizer")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        user_defined_symbols=[], control_symbols=["<mask>"], minloglevel=2)
    path = workspace / "spiece.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def test_without_marks_it_is_the_text(tokenizer):
    assert show(tokenizer, tokenizer.encode(TEXT), [], {}) == TEXT


@pytest.mark.parametrize("seed", range(5))
def test_taking_the_marks_away_gives_the_text_back(tokenizer, seed):
    """Blanks between words survive for both kinds of tokenizer, wherever the masks fall."""
    text = TEXT.replace(" —", "").replace("ä", "a")  # the others may be parts of letters
    ids = tokenizer.encode(text)
    hidden = random.Random(seed).sample(range(len(ids)), len(ids) // 2)
    shown = show(tokenizer, ids, [], dict.fromkeys(hidden, "MASK"))
    assert shown.count("[MASK:") == len(hidden)
    shown = shown.replace("[MASK:▁]", "")  # SentencePiece's blank before the text, which is none
    assert re.sub(r"\[MASK:(.*?)\]", r"\1", shown) == text


def test_document_ends_are_marked_where_they_are(tokenizer):
    first, second = tokenizer.encode("the small cat"), tokenizer.encode("the old house")
    ids = [*first, tokenizer.eod_id, *second]
    before, after = show(tokenizer, ids, [len(first) + 1], {}).split(END_OF_DOCUMENT + "\n")
    assert before.startswith("the small cat") and after.strip() == "the old house"
    assert show(tokenizer, ids, [len(ids)], {}).endswith(END_OF_DOCUMENT + "\n")


def test_marks_of_mlm_tell_masked_replaced_and_kept_apart(tokenizer):
    ids = np.array(tokenizer.encode(TEXT) * 8)
    sample = Sample(0, 0, 0, 0, ids, np.array([len(ids)]))
    objective = Objective.from_yaml(
        {"name": "mlm", "mask_ratio": 0.6, "mask_fraction": 0.4, "random_fraction": 0.3}, "objective")
    labelled = objective.apply(sample, 1, Vocabulary.of(tokenizer))
    marks = marks_of(objective, labelled, sample, tokenizer)
    assert sorted(marks) == labelled.positions_N.tolist()
    for position, mark in marks.items():
        seen, hidden = labelled.inputs_S[position], ids[position]
        kind = "MASK" if seen == tokenizer.mask_id else "KEPT" if seen == hidden else "RANDOM"
        assert mark.partition(":")[0] == kind
    assert {mark.partition(":")[0] for mark in marks.values()} == {"MASK", "KEPT", "RANDOM"}


def test_marks_of_clm_are_the_segment_ends(tokenizer):
    ids = np.array(tokenizer.encode(TEXT))
    sample = Sample(0, 0, 0, 0, ids, np.array([4, 9, len(ids)]))
    objective = Objective.from_yaml("clm", "objective")
    marks = marks_of(objective, objective.apply(sample, 1, Vocabulary.of(tokenizer)), sample, tokenizer)
    assert marks == dict.fromkeys([3, 8, len(ids) - 1], "NO TARGET")


def test_parts_of_a_letter_are_shown_by_their_token_names(workspace):
    tokenizer = load_tokenizer(workspace / "tokenizer")
    ids = tokenizer.encode("—")  # three bytes, none of them a letter
    assert len(ids) == 3
    assert "\ufffd" not in show(tokenizer, ids, [], {0: "MASK", 1: "MASK", 2: "MASK"})


def test_terminal_escapes_of_the_corpus_do_not_reach_the_terminal(workspace):
    tokenizer = load_tokenizer(workspace / "tokenizer")
    ids = tokenizer.encode("a\x1b[31mb\tc\nd\x9b")
    assert show(tokenizer, ids, [], {}) == "a\\x1b[31mb    c\nd\\x9b"
    assert show(tokenizer, tokenizer.encode("\n"), [], {0: "MASK"}) == "[MASK:\\n]"


def test_indented_lines_fit_a_log_and_lose_nothing():
    text = "word " * 60 + "\n\n    indented\n" + "x" * 250
    lines = indented(text).split("\n")
    assert max(map(len, lines)) <= 100 and all(line.startswith("  |") for line in lines)
    assert "  |     indented".rstrip() in lines
    assert "".join(line[4:] for line in lines).count("x") == 250
