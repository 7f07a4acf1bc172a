"""Checked examples of the four families, whatever they were read from.

    1. `load_examples(dataset)`     dataset -> `Examples`: train, validation, test and the labels

Each row is checked where it is read: a label that is missing or unknown, a span that its context does not hold, an
empty text become one `UserError` that names the file and line. Without a validation set, 5 % of train are it, drawn
with seed 42 (arXiv 2507.00994, fine-tuning).
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.finetune.readers import Row, read_split
from megatron_encdec.platform.errors import UserError

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE, VALIDATION_SEED = 0.05, 42


class Text(NamedTuple):
    """Sequence classification: one text or two, and the label's name."""

    where: str
    text: str
    pair: str | None
    label: str


class Words(NamedTuple):
    """Token classification: words, and a tag (B-X, I-X, O) for each."""

    where: str
    words: Sequence[str]
    tags: Sequence[str]


class Question(NamedTuple):
    """Span extraction: `answers` are (text, start in characters); none of them: the context has no answer."""

    where: str
    question: str
    context: str
    answers: Sequence[tuple[str, int]]


class Pair(NamedTuple):
    """Retrieval: a query and the documents that answer it."""

    where: str
    query: str
    positives: Sequence[str]


@dataclass(frozen=True)
class Examples:
    """`labels` of SC (classes) and TC (tags), in order; `documents` (IR): texts to search beside all positives."""

    train: list
    validation: list
    test: list
    labels: tuple[str, ...] = ()
    documents: list[str] = field(default_factory=list)


def load_examples(dataset: DatasetConfig) -> Examples:
    """All examples of `dataset`, checked."""
    if dataset.docstrings:
        from megatron_encdec.finetune.embedded import derive

        found = derive(dataset)
    else:
        parse = _PARSERS[dataset.family]
        columns = {"train": dataset.columns if dataset.train_columns is None else dataset.train_columns}
        found = {split: [parse(row, columns.get(split, dataset.columns)) for row in read_split(dataset, split)]
                 for split in SPLITS if getattr(dataset, split)}
    if "validation" not in found:
        found["train"], found["validation"] = _split_off(found["train"], dataset)
    documents = []
    if dataset.documents:
        rows = read_split(replace(dataset, test=dataset.documents), "test")
        documents = [_text(row, dataset.columns, "document") for row in rows]
    examples = Examples(*(_first(found[split], dataset, split) for split in SPLITS), documents=documents)
    if dataset.family in ("SC", "TC"):
        examples = replace(examples, labels=_labels(dataset, examples))
    return examples


def _split_off(train: list, dataset: DatasetConfig) -> tuple[list, list]:
    if len(train) < 2:
        raise UserError(f"{dataset.train}: one example is too few to take a validation set from; give `validation`")
    order = list(range(len(train)))
    random.Random(VALIDATION_SEED).shuffle(order)
    count = max(1, round(VALIDATION_SHARE * len(train)))
    return [train[i] for i in sorted(order[count:])], [train[i] for i in sorted(order[:count])]


def _first(examples: list, dataset: DatasetConfig, split: str) -> list:
    """At most as many as the dataset allows, drawn with a fixed seed."""
    limit = dataset.max_train if split == "train" else dataset.max_eval
    if limit is None or len(examples) <= limit:
        return examples
    return [examples[i] for i in sorted(random.Random(VALIDATION_SEED).sample(range(len(examples)), limit))]


def _labels(dataset: DatasetConfig, examples: Examples) -> tuple[str, ...]:
    """The labels in order, after checking that every example has one of them."""
    def of(example) -> list[str]:
        return [example.label] if dataset.family == "SC" else list(example.tags)

    known = dataset.labels or tuple(sorted({label for example in examples.train for label in of(example)}))
    if len(known) < 2:
        raise UserError(f"{dataset.train}: all labels are {known[0]!r}; there is nothing to tell apart")
    allowed = set(known)
    for split in SPLITS:
        for example in getattr(examples, split):
            for label in of(example):
                if label not in allowed:
                    source = "labels" if dataset.labels else "the training set's labels"
                    raise UserError(f"{example.where}: label {label!r} is not one of {source}: "
                                    f"{', '.join(known[:20])}{' ...' if len(known) > 20 else ''}")
    return known


def _value(row: Row, columns: dict[str, str], role: str, required: bool = True) -> Any:
    where, values = row
    name = columns.get(role, role)
    if values.get(name) is None:
        if not required and role not in columns:
            return None
        raise UserError(f"{where}: no {name!r} ({role}); columns there: {', '.join(map(str, values))}")
    return values[name]


def _text(row: Row, columns: dict[str, str], role: str) -> str:
    value = _value(row, columns, role)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row[0]}: {columns.get(role, role)!r} ({role}) is to be a text, found {value!r}")
    return value


def _parse_text(row: Row, columns: dict[str, str]) -> Text:
    pair = _text(row, columns, "text_pair") if _value(row, columns, "text_pair", False) is not None else None
    label = _value(row, columns, "label")
    if isinstance(label, (dict, list, float, bool)) or str(label) == "":
        raise UserError(f"{row[0]}: a label is a name or a number of a class, found {label!r}")
    return Text(row[0], _text(row, columns, "text"), pair, str(label))


def _parse_words(row: Row, columns: dict[str, str]) -> Words:
    words, tags = _value(row, columns, "tokens"), _value(row, columns, "tags")
    if isinstance(words, str) and isinstance(tags, str):  # CSV: separated by spaces
        words, tags = words.split(), tags.split()
    if not isinstance(words, list) or not isinstance(tags, list) or not words:
        raise UserError(f"{row[0]}: tokens and tags are to be lists, and not empty")
    if len(words) != len(tags):
        raise UserError(f"{row[0]}: {len(words)} tokens, but {len(tags)} tags")
    tags = [str(tag) for tag in tags]
    for tag in tags:
        if tag != "O" and tag[:2] not in ("B-", "I-"):
            raise UserError(f"{row[0]}: tag {tag!r}: expected O, B-<type> or I-<type>")
    return Words(row[0], [str(word) for word in words], tags)


def _parse_question(row: Row, columns: dict[str, str]) -> Question:
    where, context = row[0], _text(row, columns, "context")
    answers = _value(row, columns, "answers")
    if isinstance(answers, str):  # CSV: SQuAD's answers as JSON
        try:
            answers = json.loads(answers)
        except ValueError:
            answers = [answers]
    if isinstance(answers, dict):
        answers = list(zip(answers.get("text", ()), answers.get("answer_start", answers.get("start", ())),
                           strict=False))
    if not isinstance(answers, (list, tuple)):
        raise UserError(f"{where}: answers: expected SQuAD's {{text: [...], answer_start: [...]}}, found {answers!r}")
    return Question(where, _text(row, columns, "question"), context,
                    [_answer(where, context, answer) for answer in answers])


def _answer(where: str, context: str, answer: Any) -> tuple[str, int]:
    """A checked (text, start). A bare text, as ReCoRD has it, is taken where it first stands in the context."""
    if isinstance(answer, str):
        answer = (answer, context.find(answer))
    elif isinstance(answer, dict):
        answer = (answer.get("text"), answer.get("answer_start", answer.get("start")))
    text, start = answer
    if not isinstance(text, str) or not text or isinstance(start, bool) or not isinstance(start, int):
        raise UserError(f"{where}: an answer is a text and where it starts, found {answer!r}")
    if start < 0 or start + len(text) > len(context):
        raise UserError(f"{where}: the answer {text!r} at {start} lies outside the context ({len(context)} characters)")
    if context[start : start + len(text)] != text:
        found = context[start : start + len(text)]
        raise UserError(f"{where}: the answer is {text!r}, but the context has {found!r} at {start}")
    return text, start


def _parse_pair(row: Row, columns: dict[str, str]) -> Pair:
    positives = _value(row, columns, "positive")
    positives = positives if isinstance(positives, list) else [positives]
    texts = [one.get("text") if isinstance(one, dict) else one for one in positives]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{row[0]}: positive: expected a text or a list of them, found {positives!r}")
    return Pair(row[0], _text(row, columns, "query"), texts)


_PARSERS: dict[str, Callable[[Row, dict[str, str]], Any]] = {
    "SC": _parse_text, "TC": _parse_words, "QA": _parse_question, "IR": _parse_pair}
