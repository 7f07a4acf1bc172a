"""Lineage: what determined a state, as a hash. It alone decides whether a run may continue from a checkpoint."""

import hashlib
import json
from typing import Any


def history_hash(history: dict) -> str:
    """sha256 of the history's canonical JSON."""
    text = json.dumps(history, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_keys(then: Any, now: Any, where: str = "") -> dict[str, list]:
    """Dotted key -> [then, now] of what differs between two trees; lists of another length as a whole."""
    if isinstance(then, dict) and isinstance(now, dict):
        pairs = {f"{where}.{key}" if where else str(key): (then.get(key, "absent"), now.get(key, "absent"))
                 for key in sorted(then.keys() | now.keys())}
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = {f"{where}.{number}": pair for number, pair in enumerate(zip(then, now, strict=True))}
    else:
        return {where: [then, now]} if then != now else {}
    return {key: both for inner, pair in pairs.items() for key, both in changed_keys(*pair, inner).items()}


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """The same as lines for people: `key: recorded -> asked for`."""
    return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed_keys(then, now, where).items()]
