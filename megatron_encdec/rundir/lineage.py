"""Lineage: what determined a state, as a hash. It alone decides whether a run may continue from a checkpoint."""

import hashlib
import json
from typing import Any


def history_hash(history: dict) -> str:
    """sha256 of the history's canonical JSON."""
    text = json.dumps(history, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """One readable line for each key at which two histories differ: `key: recorded -> asked for`."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for key in sorted(then.keys() | now.keys()):
            name = f"{where}.{key}" if where else str(key)
            if key not in then or key not in now:
                found.append(f"{name}: {then.get(key, 'absent')!r} -> {now.get(key, 'absent')!r}")
            else:
                found += differences(then[key], now[key], name)
        return found
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [line for i, (a, b) in enumerate(zip(then, now, strict=True))
                for line in differences(a, b, f"{where}.{i}")]
    return [] if then == now else [f"{where}: {then!r} -> {now!r}"]
