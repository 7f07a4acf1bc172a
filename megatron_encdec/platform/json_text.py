"""JSON as its standard has it (RFC 8259): it knows no NaN and no infinity, which Python's own `json` writes as such.

    1. `json_text(value)`   one that any program reads; null in their place
"""

import json
import math
from typing import Any


def json_text(value: Any, indent: int | None = None, ascii_only: bool = True) -> str:
    """`value` (mappings, sequences, strings, numbers, None) as JSON; floats keep every digit."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
