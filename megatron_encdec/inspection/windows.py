"""Windows in words: decoded text with the ends of documents and segments, hidden tokens and missing targets marked.

    1. `marks_of(...)`      which positions of a sample an objective hides, or gives no target
    2. `show(...)`          the text, unmarked tokens decoded together, marked ones one by one

A token is decoded after the one before it, so that the blanks between words survive. What does not print
(control characters, terminal escapes) is escaped: a corpus may hold anything.
"""

import textwrap
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_encdec.data.samples import Sample
from megatron_encdec.objectives.base import Labelled, Objective
from megatron_encdec.text.tokenizer import Tokenizer

END_OF_DOCUMENT = "[END OF DOCUMENT]"
END_OF_SEGMENT = "[END OF SEGMENT]"  # where no document ends: cut by random_length, or by the window
_LINE = 94


def marks_of(objective: Objective, labelled: Labelled, sample: Sample, tokenizer: Tokenizer) -> dict[int, str]:
    """Position -> what to write before its token: `MASK`, `RANDOM:x`, `KEPT`, or `NO TARGET` if nothing is hidden."""
    if not objective.hides:
        without = np.setdiff1d(np.arange(len(sample.tokens_S)), labelled.positions_N)
        return {int(position): "NO TARGET" for position in without}
    marks = {}
    hidden_N = labelled.positions_N + objective.predicts
    for position, label in zip(hidden_N.tolist(), labelled.labels_N.tolist(), strict=True):
        seen = int(labelled.inputs_S[position])
        if seen == tokenizer.mask_id:
            marks[position] = "MASK"
        else:
            marks[position] = "KEPT" if seen == label else f"RANDOM:{_word(tokenizer, [], seen)}"
    return marks


def show(tokenizer: Tokenizer, tokens: Sequence[int], document_ends: Sequence[int], marks: dict[int, str],
         segment_ends: Sequence[int] = ()) -> str:
    """The text of a window, marked tokens one by one; ends are positions after a document's or segment's last token."""
    tokens = [int(token) for token in tokens]
    ends = {int(end): END_OF_SEGMENT for end in segment_ends} | {int(end): END_OF_DOCUMENT for end in document_ends}
    cuts = {0, len(tokens), *ends, *marks, *(position + 1 for position in marks)}
    pieces = []
    for start, stop in pairwise(sorted(cuts)):
        before = tokens[max(0, start - 1) : start]
        if start in marks:
            word = _word(tokenizer, before, tokens[start])
            pieces.append(f"[{marks[start]}:{word}]".replace("\n", "\\n"))
        else:
            pieces.append(_continuation(tokenizer, before, tokens[start:stop]))
        if stop in ends:
            pieces.append(ends[stop] + "\n")
    return "".join(map(_printable, pieces))


def indented(text: str) -> str:
    """`text` in lines of at most 100 columns after a bar, its own line breaks kept."""
    lines = [part for line in text.rstrip("\n").split("\n")
             for part in textwrap.wrap(line, _LINE, replace_whitespace=False, drop_whitespace=False) or [""]]
    return "\n".join(f"  | {line}".rstrip() for line in lines)


def _continuation(tokenizer: Tokenizer, before: list[int], tokens: list[int]) -> str:
    """The text of `tokens` after the token `before`: some decoders drop a first word's blank."""
    head, whole = tokenizer.decode(before) if before else "", tokenizer.decode(before + tokens)
    return whole.removeprefix(head) if whole.startswith(head) else tokenizer.decode(tokens)


def _word(tokenizer: Tokenizer, before: list[int], token: int) -> str:
    text = _continuation(tokenizer, before, [token])
    return tokenizer.token(token) or f"id {token}" if not text or "\ufffd" in text else text


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else
                   "    " if letter == "\t" else letter.encode("unicode_escape").decode() for letter in text)
