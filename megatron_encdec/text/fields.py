"""Which text of a document is taken, and of which documents: nested keys, several keys joined, filters on a field.

    1. `selection(keys, join, where)`   what the command line says -> a plain key, or `Fields` where that is not enough
    2. `Fields.parse(line)`             as `corpus.parse_line`; `Fields.select(record)` of a row
    3. `leaves(record)`, `listed`       the keys that a document has, for who named one that it does not have

`a.b` names the key `a.b` where there is one, else the key `b` inside `a`. A plain key alone stays a string and goes the
fast way (`corpus.parse_line`).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text import corpus

CONDITION = re.compile(r"(?P<field>[^=!<>]+?)\s*(?P<sign>!=|>=|<=|=|>|<)\s*(?P<value>.*)", re.DOTALL)
KEYS_SHOWN = 20  # in a message
_ABSENT = object()


@dataclass(frozen=True)
class Condition:
    """A field has, or has not, one of some values; or is above or below a number."""

    field: str
    sign: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """`language=en`, `language=en|de`, `score>=3`, `source!=web`."""
        found = CONDITION.fullmatch(text)
        if not found or not found["value"]:
            raise UserError(f"--where {text!r}: expected FIELD=VALUE (several: FIELD=A|B), FIELD!=VALUE, or "
                            "FIELD>=NUMBER, with >, <, <=")
        if found["sign"] not in ("=", "!=") and _number(found["value"]) is None:
            raise UserError(f"--where {text!r}: {found['sign']} compares numbers, and {found['value']!r} is none")
        return cls(found["field"], found["sign"], found["value"])

    def holds(self, record: Mapping) -> bool:
        """Whether it does in this document; where the field is not there, only a `!=` does."""
        found = at(record, self.field)
        if self.sign in ("=", "!="):
            return (found is not _ABSENT and any(_same(found, one) for one in self.value.split("|"))) == (
                self.sign == "=")
        number, bound = _number(found), _number(self.value)
        if number is None:
            return False
        return {">=": number >= bound, "<=": number <= bound, ">": number > bound, "<": number < bound}[self.sign]

    def __str__(self):
        return f"{self.field}{self.sign}{self.value}"


@dataclass(frozen=True)
class Fields:
    """The texts under `keys` with `join` between them, of documents in which every one of `where` holds. Of several
    keys those without a text in a document are left out there."""

    keys: tuple[str, ...]
    join: str = "\n\n"
    where: tuple[Condition, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The names of keys and fields, each once."""
        return list(dict.fromkeys([*self.keys, *(one.field for one in self.where)]))

    def __str__(self):
        joined = f" joined by {self.join!r}" if len(self.keys) > 1 else ""
        where = f" where {' and '.join(map(str, self.where))}" if self.where else ""
        return " + ".join(self.keys) + joined + where

    def texts(self, record: Any) -> tuple[list[str], str | None]:
        """(the texts, None) of a document, or ([], reason); blank ones are among them only where all are blank."""
        if not isinstance(record, dict):
            return [], "bad_json"
        if not all(one.holds(record) for one in self.where):
            return [], "filtered"
        found = [at(record, key) for key in self.keys]
        there = [one for one in found if one is not _ABSENT]
        if not there:
            return [], "missing_key"
        texts = [one for one in there if isinstance(one, str)]
        if not texts or any(one is not None and not isinstance(one, str) for one in there):
            return [], "not_text"
        full = [one for one in texts if one and not one.isspace()]
        return (full, None) if full else ([], "empty")

    def select(self, record: Any) -> tuple[str | None, bytes | None, str | None]:
        """(text, its UTF-8 bytes, None) of a document as Python has it, or (None, None, reason)."""
        texts, reason = self.texts(record)
        return corpus.encoded(None if reason else self.join.join(texts), reason)

    def texts_of_line(self, line: str) -> tuple[list[str], str | None]:
        """As `texts`, of a JSON line."""
        try:
            return self.texts(json.loads(line))
        except (ValueError, RecursionError):
            return [], "bad_json" if line.strip() else "empty"

    def parse(self, data: bytes) -> tuple[str | None, bytes | None, str | None]:
        """As `corpus.parse_line`: orjson first, what it refuses is for Python's parser to judge."""
        try:
            return self.select(orjson.loads(data))
        except ValueError:
            pass
        try:
            texts, reason = self.texts_of_line(data.decode("utf-8"))
        except UnicodeDecodeError:
            return None, None, "bad_utf8"
        return corpus.encoded(None if reason else self.join.join(texts), reason)


Selection = str | Fields


def selection(keys: str | Sequence[str], join: str = "\n\n", where: Iterable[str] = ()) -> Selection:
    """What is taken of each document; a single key without dots, and no filter, is that key itself. Raises `UserError`
    for a condition that is none, and a key that is given twice."""
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--text-key {twice[0]}: given twice")
    conditions = tuple(map(Condition.parse, where))
    if not keys or not all(keys):
        raise UserError("--text-key: empty; name the key of the text, such as text")
    return keys[0] if len(keys) == 1 and "." not in keys[0] and not conditions else Fields(keys, join, conditions)


def columns_of(key: Selection) -> list[str]:
    """The names that it reads of a document."""
    return key.columns if isinstance(key, Fields) else [key]


def parser(key: Selection) -> Callable[[bytes], tuple[str | None, bytes | None, str | None]]:
    """The function from a line's bytes to (text, UTF-8 bytes, reason)."""
    if isinstance(key, Fields):
        return key.parse
    return lambda data: corpus.parse_line(data, key)


def at(record: Any, key: str) -> Any:
    """The value under `key`, or under its first part and then the rest inside; `_ABSENT` where there is none."""
    if isinstance(record, dict):
        if key in record:
            return record[key]
        first, dot, rest = key.partition(".")
        while dot:
            if first in record and (found := at(record[first], rest)) is not _ABSENT:
                return found
            more, dot, rest = rest.partition(".")
            first = f"{first}.{more}"
    return _ABSENT


def has(record: Any, key: str) -> bool:
    """Whether `at` finds a value there."""
    return at(record, key) is not _ABSENT


def leaves(record: Mapping[str, Any]) -> list[str]:
    """The keys, as `--text-key` has them (`a`, `b.c`, `b.d.e`), of all but mappings; those of strings first."""
    found: list[tuple[bool, str]] = []
    waiting = [("", record)]
    for prefix, mapping in waiting:  # no recursion: it may be deep
        for name, value in mapping.items():
            if isinstance(value, Mapping) and value:
                waiting.append((f"{prefix}{name}.", value))
            else:
                found.append((not isinstance(value, str), f"{prefix}{name}"))
    return list(dict.fromkeys(name for _, name in sorted(found, key=lambda one: one[0])))


def listed(names: Sequence[str]) -> str:
    """The first of `names`, quoted, and how many more there are."""
    more = f" and {len(names) - KEYS_SHOWN} more" if len(names) > KEYS_SHOWN else ""
    return ", ".join(map(repr, names[:KEYS_SHOWN])) + more


def _same(found: Any, text: str) -> bool:
    if isinstance(found, bool) or found is None:
        return json.dumps(found) == text
    if isinstance(found, (int, float)):
        return _number(text) == found
    return found == text


def _number(value: Any) -> float | None:
    """A finite number, also written as a text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
