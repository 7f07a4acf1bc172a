"""CoNLL columns: the word first, its tag last, a blank line between sentences.

    1. `read_conll(path)`     [(line where the sentence begins, {"tokens": [...], "tags": [...]})]

The first word's line says how columns are separated (by tabs if it has one, else by blanks) and how many there are; a
line with another number is refused, so that no tag is taken from the wrong column. `-DOCSTART-` lines end a sentence.
A comment stands before a sentence's first word, begins with `#`, and is `# name = value` or does not end in a tag.
"""

import re
from pathlib import Path

from megatron_encdec.finetune.lines import numbered_lines
from megatron_encdec.platform.errors import UserError

_BLANKS = re.compile(r"[ \t]+")  # and no other white space: a word may hold a no-break space
_COMMENT = re.compile(r"# ?\w+ = ")
_TAG = re.compile(r"O|[BI]-.+")


def is_tag(text: str) -> bool:
    """Whether `text` is a tag of the IOB kind: O, B-<type> or I-<type>."""
    return _TAG.fullmatch(text) is not None


def read_conll(path: Path) -> list[tuple[int, dict[str, list[str]]]]:
    """The sentences of the file at `path`. Raises `UserError` with file and line."""
    sentences: list[tuple[int, dict[str, list[str]]]] = []
    words: list[str] = []
    tags: list[str] = []
    tabs, count, begin = False, 0, 0

    def end() -> None:
        if words:
            sentences.append((begin, {"tokens": words[:], "tags": tags[:]}))
            words.clear()
            tags.clear()

    for number, line in numbered_lines(path):
        text = line.rstrip("\r\n")
        if not text.strip(" \t") or text.startswith("-DOCSTART-"):
            end()
            continue
        if not count:
            tabs = "\t" in text
        columns = [column.strip(" ") for column in text.split("\t")] if tabs else _BLANKS.split(text.strip(" \t"))
        if not words and text.startswith("#") and (_COMMENT.match(text) or not is_tag(columns[-1])):
            continue
        _check(f"{path}:{number}", columns, count, tabs)
        count, begin = len(columns), begin if words else number
        words.append(columns[0])
        tags.append(columns[-1])
    end()
    return sentences


def _check(where: str, columns: list[str], count: int, tabs: bool) -> None:
    if len(columns) < 2:
        raise UserError(f"{where}: one column, expected a word and a tag (separated by {'a tab' if tabs else 'blanks'}"
                        f"{', as in the lines above' if count else ''})")
    if count and len(columns) != count:
        raise UserError(f"{where}: {len(columns)} columns, but the lines above have {count} (separated by "
                        f"{'tabs' if tabs else 'blanks'})")
    if not columns[0]:
        raise UserError(f"{where}: no word in the first column")
    if not is_tag(columns[-1]):
        raise UserError(f"{where}: tag {columns[-1]!r} (the last column): expected O, B-<type> or I-<type>")
