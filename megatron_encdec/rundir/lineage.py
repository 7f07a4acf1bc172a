"""Lineage: what determined a state, as a hash. It alone decides whether a run may continue from a checkpoint."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any


def history_hash(history: dict) -> str:
    """sha256 of the history's canonical JSON."""
    text = json.dumps(history, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_keys(then: Any, now: Any, where: str = "") -> dict[str, list]:
    """Dotted key -> [then, now] of what differs between two trees; lists of another length as a whole."""
    return {key: [old, new] for key, old, new in _walk(then, now, where)}


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """The same as lines for people: `key: recorded -> asked for`."""
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in _walk(then, now, where)]


def _walk(then: Any, now: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from _walk(then.get(key, "absent"), now.get(key, "absent"), f"{where}.{key}" if where else str(key))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, pair in enumerate(zip(then, now, strict=True)):
            yield from _walk(*pair, f"{where}.{number}")
    elif then != now:
        yield where, then, now
