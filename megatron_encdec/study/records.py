"""The small JSON files of a results tree: read, and refused in one line that names the file.

    1. `read_json(path)`                 a file -> its object
    2. `score_of(record, split, path)`   the score of `validation` or `test`, from 0 to 1
"""

import math
from pathlib import Path
from typing import Any

import orjson

from megatron_encdec.platform.errors import UserError


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises `UserError` naming the file where it holds anything else."""
    try:
        record = orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except orjson.JSONDecodeError as error:  # NaN and Infinity are no JSON either
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run that cell again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


def score_of(record: Any, split: str, path: Path, where: str = "") -> float:
    """`record[split]["score"]`, checked: a finite number from 0 to 1. `where` names `record` inside its file."""
    part = record.get(split) if isinstance(record, dict) else None
    if not isinstance(part, dict) or "score" not in part:
        raise UserError(f"{path}: {where}{split}.score is missing")
    score = part["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise UserError(f"{path}: {where}{split}.score: expected a number, found {score!r}")
    if not 0.0 <= score <= 1.0:
        raise UserError(f"{path}: {where}{split}.score: expected a fraction from 0 to 1, found {score!r}"
                        f"{' (per cent? divide by 100)' if 1.0 < score <= 100.0 else ''}")
    return float(score)
