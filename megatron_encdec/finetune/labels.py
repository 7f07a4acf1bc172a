"""Classes and tags: their names, their order, and the validation set that leaves train each of them.

    1. `class_name(value, fixed)`        a value of the label column -> the class's name, or ValueError with the cause
    2. `labels_of(examples)`             the labels of SC and TC examples in order: numbers by value, names by letter
    3. `split_off(examples)`             (train, validation)
    4. `check_labels(...)`               every example has known labels

Formats and tools write one class differently: 1, 1.0 (pandas, where a value of the column was missing), "1", true.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_encdec.platform.errors import UserError

VALIDATION_SHARE, VALIDATION_SEED = 0.05, 42
_DECIMAL = re.compile(r"[+-]?\d+\.\d*|[+-]?\.\d+")


def class_name(value: Any, fixed: Sequence[str] | None = None) -> str:
    """The class that `value` names. One that stands so in `fixed`, the dataset's `labels`, is that.

    Raises ValueError: a float that is no whole number (also as text, as CSV has it) is a score, and anything but a
    text, a number or a boolean is no label.
    """
    if isinstance(value, (str, int, float)) and str(value) in (fixed or ()):
        return str(value)
    if isinstance(value, str) and value.strip() and not _DECIMAL.fullmatch(value):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        number = float(value)
    elif isinstance(value, float):
        number = value
    else:
        raise ValueError(f"a label is a name, a class number, true or false; found {value!r}")
    if math.isnan(number):
        raise ValueError("the label is missing (NaN)")
    if not number.is_integer():
        raise ValueError(f"a label is a class, and {value!r} is a score (regression is not offered); if it does name a "
                         "class, list all of them as texts in the dataset's `labels`")
    return str(int(number))


def _of(example: Any) -> Iterable[str]:
    return example.tags if hasattr(example, "tags") else (example.label,)


def labels_of(examples: Sequence) -> tuple[str, ...]:
    """The labels that occur, in order."""
    found = {label for example in examples for label in _of(example)}
    if all(re.fullmatch(r"-?\d+", label) for label in found):
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    return tuple(sorted(found))


def split_off(examples: list, labelled: bool) -> tuple[list, list]:
    """(train, validation): 5 % of `examples`, drawn with seed 42 (arXiv 2507.00994, fine-tuning). `labelled`: an
    example that is the last one of a label stays in train, and the next of the draw takes its place while there are
    others."""
    order = list(range(len(examples)))
    random.Random(VALIDATION_SEED).shuffle(order)
    count = max(1, round(VALIDATION_SHARE * len(examples)))
    spare = _spare(examples, order, count) if labelled else []
    taken = set(list(dict.fromkeys([*spare, *order]))[:count])
    return [one for place, one in enumerate(examples) if place not in taken], [examples[i] for i in sorted(taken)]


def _spare(examples: list, order: list[int], count: int) -> list[int]:
    """The first `count` places of `order` whose labels all occur elsewhere too."""
    left = Counter(label for example in examples for label in set(_of(example)))
    taken: list[int] = []
    for place in order:
        labels = set(_of(examples[place]))
        if len(taken) < count and all(left[label] > 1 for label in labels):
            taken.append(place)
            left.subtract(labels)
    return taken


def check_labels(known: Sequence[str], source: str, examples: Iterable) -> None:
    """Raises `UserError` for an example with a label that is not in `known`, which is `source`."""
    allowed = set(known)
    for example in examples:
        for label in _of(example):
            if label not in allowed:
                raise UserError(f"{example.where}: label {label!r} is not one of {source}: "
                                f"{', '.join(known[:20])}{' ...' if len(known) > 20 else ''}; if it is one, list all "
                                "of them in the dataset's `labels`")
