"""What a field of a row says: the class that a label names, and the answers of a question. ValueError with the cause.

A class is written differently by different tools: 1, 1.0 (pandas, where a value of the column was missing), "1", true.
Answers are SQuAD's {"text": [...], "answer_start": [...]}, a list of {"text", "answer_start"} (or "start"), or of texts
alone (ReCoRD), each of which is taken where it first stands in the context; CSV holds any of these as JSON, or one
text. There is no answer where that is declared: an empty list, or `is_impossible`.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

Answer = tuple[str, int]
_DECIMAL = re.compile(r"[+-]?\d+\.\d*|[+-]?\.\d+")


def class_name(value: Any, fixed: Sequence[str] = ()) -> str:
    """The class that `value` names. One that stands so in `fixed`, the dataset's `labels`, is that.

    A float that is no whole number (also as text, as in CSV) is a score; only texts, numbers and booleans are labels.
    """
    if isinstance(value, (str, int, float)) and str(value) in fixed:
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, str) and value.strip() and not _DECIMAL.fullmatch(value)):
        return str(value)
    if not isinstance(value, float) and not (isinstance(value, str) and value.strip()):
        raise ValueError(f"a label is a name, a class number, true or false; found {value!r}")
    number = float(value)
    if math.isnan(number):
        raise ValueError("the label is missing (NaN)")
    if not number.is_integer():
        raise ValueError(f"a label is a class, and {value!r} is a score (of a set with problem_type: regression); if "
                         "it does name a class, list all of them as texts in the dataset's `labels`")
    return str(int(number))


def class_names(value: Any, fixed: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes that the list `value` names (JSON in CSV); none, one or more."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"labels of a text are a list (in CSV as JSON), found {value!r}") from None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"labels of a text are a list, found {value!r}; with one class for each text, leave out "
                         "problem_type")
    return tuple(dict.fromkeys(class_name(one, fixed) for one in value))


def score_value(value: Any) -> float:
    """The finite number that `value` is."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"regression has a number for each text, found {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"regression has a finite number for each text, found {value!r}")
    return number


def read_answers(answers: Any, impossible: Any, context: str) -> list[Answer]:
    """(text, start in characters) of each, checked. `impossible` is SQuAD 2.0's `is_impossible`, or None."""
    if impossible is not None and impossible not in (0, 1, "true", "false", "True", "False"):
        raise ValueError(f"is_impossible: expected true or false, found {impossible!r}")
    declared = impossible in (1, "true", "True")
    if answers is None and declared:
        return []
    if isinstance(answers, str):  # of CSV
        answers = _parsed(answers, context)
    found = [_checked(text, start, context) for text, start in _pairs(answers)]
    if impossible is not None and declared == bool(found):
        raise ValueError(f"is_impossible is {impossible!r}, but answers {'has some' if found else 'is empty'}")
    return found


def _parsed(answers: str, context: str) -> Any:
    if answers[:1] in ("{", "["):
        try:
            return json.loads(answers)
        except ValueError as error:
            if answers not in context:
                raise ValueError(f"answers: {answers[:80]!r} is not JSON ({error}), and no text of the context; write "
                                 "it with json.dumps") from None
    return [answers]


def _pairs(answers: Any) -> list[tuple[Any, Any]]:
    """(text, start or None) of each answer; None only for a text that came alone."""
    if isinstance(answers, dict):
        return _pairs([answers]) if isinstance(answers.get("text"), str) else _columns(answers)
    unknown = ValueError('answers: expected SQuAD\'s {"text": [...], "answer_start": [...]}, a list of {"text", '
                         f'"answer_start"}}, or a list of texts; found {answers!r}')
    if not isinstance(answers, (list, tuple)):
        raise unknown
    pairs = []
    for answer in answers:
        match answer:
            case str():
                pairs.append((answer, None))
            case dict():
                pairs.append((answer.get("text"), _number(_given_start(answer, answer.get("text")))))
            case [text, start]:
                pairs.append((text, _number(start)))
            case _:
                raise unknown
    return pairs


def _columns(answers: dict) -> list[tuple[Any, Any]]:
    texts = answers.get("text")
    if texts is None:
        raise ValueError(f"answers: no text there, only {', '.join(map(str, answers)) or 'nothing'}; a question "
                         "without an answer has an empty list")
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"answers: text: expected a list, found {texts!r}")
    if not texts and answers.get("answer_start", answers.get("start")) is None:
        return []
    starts = _given_start(answers, texts and texts[0], "; to take each text where it first stands, give a list of "
                          "texts alone")
    if not isinstance(starts, (list, tuple)) or len(starts) != len(texts):
        count = len(starts) if isinstance(starts, (list, tuple)) else f"{starts!r}, no list,"
        raise ValueError(f"answers: {len(texts)} text{'s' * (len(texts) != 1)}, but {count} answer_start")
    return [(text, _number(start)) for text, start in zip(texts, starts, strict=True)]


def _given_start(answer: dict, text: Any, way_out: str = "") -> Any:
    start = answer.get("answer_start", answer.get("start"))
    if start is None:
        raise ValueError(f"answers: {text!r} has no answer_start (there {'is' if len(answer) == 1 else 'are'} "
                         f"{', '.join(map(str, answer))}){way_out}")
    return start


def _number(start: Any) -> int:
    if isinstance(start, float) and start.is_integer():  # pandas, where another row has none
        start = int(start)
    if isinstance(start, bool) or not isinstance(start, int):
        raise ValueError(f"answers: answer_start is a number of characters, found {start!r}")
    return start


def _checked(text: Any, start: int | None, context: str) -> Answer:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"answers: an answer is a text, found {text!r}; a question without one has an empty list")
    first = context.find(text)
    if start is None:
        if first < 0:
            raise ValueError(f"answers: {text!r} does not stand in the context")
        return text, first
    if start >= 0 and context[start : start + len(text)] == text:
        return text, start
    encoded = context.encode("utf-8")
    if start > 0 and encoded[start : start + len(text.encode("utf-8"))] == text.encode("utf-8"):
        raise ValueError(f"answers: answer_start {start} of {text!r} counts bytes; count characters")
    if start < 0 or start + len(text) > len(context):
        problem = f"the answer {text!r} at {start} lies outside the context ({len(context)} characters)"
    else:
        problem = f"the answer is {text!r}, but the context has {context[start : start + len(text)]!r} at {start}"
    raise ValueError(problem + (f"; it first stands at {first}" if first >= 0 else "; it stands nowhere in it"))
