"""Checked examples of the four families, whatever they were read from.

    1. `load_examples(dataset)`     dataset -> `Examples`: train, validation, test and the labels
    2. `Examples.answers(split)`    of each query of retrieval, the documents that answer it

Each row is checked where it is read: a label that is missing or unknown, a span that its context does not hold, an
empty text become one `UserError` that names the file and line. Labels are those of the whole training set, in order:
numbers by value, names by letter. Without a validation set, 5 % of train are it.
"""

import contextlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_encdec.finetune.beir import read_beir, read_documents
from megatron_encdec.finetune.columns import is_tag
from megatron_encdec.finetune.config import MULTI, REGRESSION, SINGLE, DatasetConfig
from megatron_encdec.finetune.rows import UNLABELLED, Row, in_columns, read_split
from megatron_encdec.finetune.values import class_name, class_names, read_answers, score_value
from megatron_encdec.platform.errors import UserError

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE, SEED = 0.05, 42


class Text(NamedTuple):
    """Sequence classification: one text or two, and the label's name (or all labels' names, or a number)."""

    where: str
    text: str
    pair: str | None
    label: str | tuple[str, ...] | float


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
    """Retrieval: a query, the documents that answer it, and some that do not, though they might seem to."""

    where: str
    query: str
    positives: Sequence[str]
    negatives: Sequence[str] = ()


@dataclass(frozen=True)
class Examples:
    """All of a dataset."""

    train: list
    validation: list
    test: list
    labels: tuple[str, ...] = ()  # classes (SC) or tags (TC), in order
    documents: list[str] = field(default_factory=list)  # of retrieval: texts to search beside all positives
    unlabelled: dict[str, int] = field(default_factory=dict)  # split -> rows left out, for the hub gives them no label
    # of retrieval: split -> query -> all documents that answer it, also by rows that were not drawn
    known: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def answers(self, split: str) -> list[list[str]]:
        """Of each pair of `split`, all documents that answer its query: its own, and those of other rows."""
        return [self.known[split][pair.query] for pair in getattr(self, split)]

    def corpus(self, pairs: Sequence[Pair]) -> list[str]:
        """What the queries of `pairs` are searched in: all their positives, then `documents`, each text once."""
        return list(dict.fromkeys([text for pair in pairs for text in pair.positives] + self.documents))


def load_examples(dataset: DatasetConfig, seed: int = 0) -> Examples:
    """All examples of `dataset`, checked; `seed` draws its `shots`."""
    unlabelled: dict[str, int] = {}
    read = _read_beir if dataset.beir else _read
    found = {split: read(dataset, split, unlabelled) for split in SPLITS if getattr(dataset, split)}
    classes = dataset.family in ("SC", "TC") and dataset.problem_type != REGRESSION
    labels = _labels(dataset, found) if classes else ()
    if dataset.family == "SC":  # all texts have a second one, or none has
        alone = [example for split in found.values() for example in split if example.pair is None]
        if 0 < len(alone) < sum(map(len, found.values())):
            raise UserError(f"{alone[0].where}: no text_pair, which other rows of the set have")
    known = {split: _known(pairs) for split, pairs in found.items()} if dataset.family == "IR" else {}
    if "validation" not in found:
        known["validation"] = known.get("train", {})
        if len(found["train"]) < 2:
            raise UserError(f"{dataset.train}: one example is too few to take a validation set from; give `validation`")
        found["train"], found["validation"] = _split_off(found["train"], bool(labels))
    documents = read_documents(Path(dataset.beir)) if dataset.beir else []
    if dataset.documents:
        documents = [_text(row, dataset.columns, "document") for row in read_split(dataset, "documents")]
    if dataset.shots is not None:
        found["train"] = _few(found["train"], dataset, labels, seed)
    found = {split: _drawn(found[split], dataset.max_train if split == "train" else dataset.max_eval)
             for split in SPLITS}
    if dataset.problem_type == REGRESSION:
        _check_numbers(dataset, found)
    return Examples(*found.values(), labels, documents, unlabelled, known)


def _known(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for pair in pairs:
        found.setdefault(pair.query, {}).update(dict.fromkeys(pair.positives))
    return {query: list(documents) for query, documents in found.items()}


def _read(dataset: DatasetConfig, split: str, unlabelled: dict[str, int]) -> list:
    """The examples of `split`; rows that the hub marks as unlabelled are counted in `unlabelled`."""
    columns = dataset.columns
    if split == "train" and dataset.train_columns is not None:
        columns = dataset.train_columns
    rows = read_split(dataset, split)
    kept = [row for row in rows if row[1].get(columns.get("label", "label")) is not UNLABELLED]
    if len(kept) < len(rows):
        unlabelled[split] = len(rows) - len(kept)
    if not kept:
        raise UserError(f"{getattr(dataset, split)}: none of its {len(rows)} rows has a label (all are -1); name "
                        f"another split as `{split}`")
    parse = {"SC": _parse_text, "TC": _parse_words, "QA": _parse_question, "IR": _parse_pair}[dataset.family]
    return [parse(row, columns, dataset) for row in kept]


def _read_beir(dataset: DatasetConfig, split: str, _: dict[str, int]) -> list[Pair]:
    folder = Path(dataset.beir)
    found = read_beir(folder, getattr(dataset, split))
    pairs = [Pair(f"{folder}: query {query}", found.queries[query],
                  [found.document(document) for document, score in judged.items() if score > 0])
             for query, judged in found.judgements.items()]
    if not (answered := [pair for pair in pairs if pair.positives]):
        raise UserError(f"{folder}: no query of split {getattr(dataset, split)} has a document with a score above 0")
    return answered


def _labels(dataset: DatasetConfig, found: dict[str, list]) -> tuple[str, ...]:
    """The labels in order, of the whole training set, after checking that every example has one of them."""
    known, source = dataset.labels, "labels"
    if not known:
        names, source = {label for example in found["train"] for label in _of(example)}, "the training set's labels"
        numbered = all(re.fullmatch(r"-?\d+", name) for name in names)
        known = tuple(sorted(names, key=(lambda name: (int(name), name)) if numbered else None))
    if len(known) < 2:
        raise UserError(f"{dataset.train}: all labels are {known[0]!r}; there is nothing to tell apart")
    allowed = set(known)
    for example in (example for split in found.values() for example in split):
        if (unknown := next((label for label in _of(example) if label not in allowed), None)) is not None:
            raise UserError(f"{example.where}: label {unknown!r} is not one of {source}: "
                            f"{', '.join(known[:20])}{' ...' if len(known) > 20 else ''}; if it is one, list all "
                            "of them in the dataset's `labels`")
    return known


def _of(example: Text | Words) -> Sequence[str]:
    found = example.tags if isinstance(example, Words) else example.label
    return (found,) if isinstance(found, str) else found


def _check_numbers(dataset: DatasetConfig, found: dict[str, list]) -> None:
    """A split whose numbers are all the same has no correlation: the hub's test sets of GLUE have -1 everywhere."""
    for split, examples in found.items():
        if len({example.label for example in examples}) < 2:
            source = getattr(dataset, split) or f"{split}, a part of {dataset.train}"
            raise UserError(f"{source}: all its numbers are {examples[0].label:g}, so nothing can correlate "
                            f"with them; name a split with scores as `{split}`, or take more of it")


def _few(examples: list, dataset: DatasetConfig, labels: tuple[str, ...], seed: int) -> list:
    """`shots` examples, or of SC with one class each so many of each class, drawn with `seed`."""
    groups = {"": list(range(len(examples)))}
    if dataset.family == "SC" and dataset.problem_type == SINGLE:
        groups = {label: [] for label in labels}
        for number, example in enumerate(examples):
            groups[example.label].append(number)
    taken = []
    for label, numbers in groups.items():
        if len(numbers) < dataset.shots:
            raise UserError(f"{dataset.train}: shots: {dataset.shots}, but there are {len(numbers)} examples for "
                            f"training{f' of class {label!r}' if label else ''}; lower shots")
        taken += random.Random(f"{seed} {label}").sample(numbers, dataset.shots)
    return [examples[number] for number in sorted(taken)]


def _split_off(examples: list, labelled: bool) -> tuple[list, list]:
    """(train, validation): 5 % of `examples`, drawn with seed 42 (arXiv 2507.00994, fine-tuning). `labelled`: the last
    example of a label stays in train, and the next of the draw takes its place while there are others."""
    labels = [set(_of(example)) if labelled else set() for example in examples]
    left = Counter(label for one in labels for label in one)
    order = list(range(len(examples)))
    random.Random(SEED).shuffle(order)
    count, spare = max(1, round(VALIDATION_SHARE * len(examples))), []
    for place in order:
        if len(spare) < count and all(left[label] > 1 for label in labels[place]):
            spare.append(place)
            left.subtract(labels[place])
    taken = set(list(dict.fromkeys([*spare, *order]))[:count])
    return [one for place, one in enumerate(examples) if place not in taken], [examples[i] for i in sorted(taken)]


def _drawn(examples: list, limit: int | None) -> list:
    """At most `limit` of them, drawn with a fixed seed."""
    if limit is None or len(examples) <= limit:
        return examples
    return [examples[i] for i in sorted(random.Random(SEED).sample(range(len(examples)), limit))]


def _value(row: Row, columns: dict[str, str], role: str, required: bool = True) -> Any:
    where, values = row
    name = columns.get(role, role)
    if values.get(name) is None and (required or role in columns):
        raise UserError(f"{where}: no {name!r} ({role}); columns there: {', '.join(map(str, values))}")
    return values.get(name)


def _text(row: Row, columns: dict[str, str], role: str) -> str:
    value = _value(row, columns, role)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row[0]}: {columns.get(role, role)!r} ({role}): expected a text, found {value!r}")
    return value


def _parse_text(row: Row, columns: dict[str, str], dataset: DatasetConfig) -> Text:
    pair = _text(row, columns, "text_pair") if _value(row, columns, "text_pair", False) is not None else None
    value, fixed = _value(row, columns, "label"), dataset.labels or ()
    try:
        if dataset.problem_type == REGRESSION:
            label = score_value(value)
        else:
            label = (class_names if dataset.problem_type == MULTI else class_name)(value, fixed)
    except ValueError as error:
        raise UserError(f"{row[0]}: {error}") from None
    return Text(row[0], _text(row, columns, "text"), pair, label)


def _parse_words(row: Row, columns: dict[str, str], dataset: DatasetConfig) -> Words:
    words, tags = _value(row, columns, "tokens"), _value(row, columns, "tags")
    if isinstance(words, str) and isinstance(tags, str):  # CSV: separated by spaces
        words, tags = words.split(), tags.split()
    if not isinstance(words, list) or not isinstance(tags, list) or not words:
        raise UserError(f"{row[0]}: tokens and tags: expected lists, and not empty")
    if len(words) != len(tags):
        raise UserError(f"{row[0]}: {len(words)} tokens, but {len(tags)} tags")
    if dataset.labels and all(type(tag) is int and 0 <= tag < len(dataset.labels) for tag in tags):
        tags = [dataset.labels[tag] for tag in tags]
    for number, (word, tag) in enumerate(zip(words, tags, strict=True), 1):
        if not isinstance(word, str) or not word:
            raise UserError(f"{row[0]}: token {number} is {word!r}, expected a text")
        if not isinstance(tag, str) or not is_tag(tag):
            raise UserError(f"{row[0]}: token {number}, {word!r}: tag {tag!r}: expected O, B-<type> or I-<type>"
                            + ("; list the tags that the numbers stand for, from 0 on, in the dataset's `labels`"
                               if type(tag) is int else ""))
    return Words(row[0], words, tags)


def _parse_question(row: Row, columns: dict[str, str], _: DatasetConfig) -> Question:
    context, impossible = _text(row, columns, "context"), row[1].get(columns.get("is_impossible", "is_impossible"))
    try:
        answers = read_answers(_value(row, columns, "answers", impossible is None), impossible, context)
    except ValueError as error:
        raise UserError(f"{row[0]}: {error}") from None
    return Question(row[0], _text(row, columns, "question"), context, answers)


def _parse_pair(row: Row, columns: dict[str, str], _: DatasetConfig) -> Pair:
    if "anchor" in row[1] and "query" not in {*row[1], *columns}:  # as sentence-transformers calls it
        columns = {**columns, "query": "anchor"}
    positives = _texts(row, "positive", _value(row, columns, "positive"))
    if not positives:
        raise UserError(f"{row[0]}: positive: expected a text or a list of them, found none")
    names = [name for name in row[1] if re.fullmatch(r"negative(_\d+)?", name)]
    names += [columns.get("negatives", "negatives")] * (columns.get("negatives", "negatives") in row[1])
    negatives = [text for name in names if row[1][name] is not None for text in _texts(row, name, row[1][name])]
    return Pair(row[0], _text(row, columns, "query"), positives, negatives)


def _texts(row: Row, name: str, value: Any) -> list[str]:
    """A text, or a list of them (or of {"text"}); in columns of text a list is JSON."""
    if isinstance(value, str) and value.startswith("[") and in_columns(row[0]):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    values = value if isinstance(value, list) else [value]
    texts = [one.get("text") if isinstance(one, dict) else one for one in values]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{row[0]}: {name}: expected a text or a list of them, found {value!r}")
    return texts
