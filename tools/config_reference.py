#!/usr/bin/env python3
"""Write docs/config.md: every key of a config, from the code (`schema.key`) that reads it.

    python tools/config_reference.py            write it
    python tools/config_reference.py --check    exit 1 if it is not up to date

A section is a dataclass: its head is the docstring, its rows are the fields. Keys of a mapping inside a mapping stand
in a table of their own, under the key that holds it.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

from megatron_encdec.model.config import PRESETS, ModelConfig
from megatron_encdec.objectives.base import OBJECTIVES, Objective
from megatron_encdec.platform import schema
from megatron_encdec.training.config import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"
HEAD = """\
# Every key of a config

This page is made from the code by `python tools/config_reference.py`; do not edit it by hand.

A config is a YAML file. Only `run.dir`, `tokenizer.path`, `data.train`, `model` and `phases` have to be given; all
other keys have the defaults below, which are those of arXiv 2507.00994 where it states them. Any key can be set on the
command line too: `megatron-encdec pretrain CONFIG.yaml optimizer.lr=1e-3 phases.0.steps=500` (items of lists have
numbers, from 0). `megatron-encdec pretrain CONFIG.yaml --dry-run` prints the whole config as it is understood, and
trains nothing. A mistyped key is refused, and the nearest ones are named. Words: [glossary.md](glossary.md).

**Changes** says whether a key may get another value in a run that has begun, when the same command is given again.
*no*: what is done was done with it, so the run is refused with the two values, and nothing happens; another value needs
another `run.dir` (perhaps a fork, [runs.md](runs.md)). *until its phase begins*: what is still to come may change.

"""
PHASES = "until its phase begins"


def kinds_of(hint) -> tuple[list, bool]:
    """The types in a hint without None, and whether None was there."""
    kinds = list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Union or isinstance(
        hint, type(int | str)) else [hint]
    return [kind for kind in kinds if kind is not type(None)], type(None) in kinds


def name_of(hint) -> str:
    """A type in words."""
    kinds, _ = kinds_of(hint)
    if len(kinds) > 1:
        return " or ".join(map(name_of, kinds))
    kind, origin, inside = kinds[0], typing.get_origin(kinds[0]), typing.get_args(kinds[0])
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in inside)
    if origin in (list, tuple):
        many = origin is list or Ellipsis in inside
        return f"list of: {name_of(inside[0])}" if many else f"{len(inside)} x {name_of(inside[0])}"
    if kind is Objective:
        return "objective"
    if dataclasses.is_dataclass(kind):
        return "mapping"
    return {int: "integer", float: "number", str: "string", bool: "`true`, `false`"}[kind]


def default_of(cls: type, field: dataclasses.Field) -> str:
    """A default as YAML has it; a required key has none."""
    if field.default is field.default_factory is dataclasses.MISSING:
        is_of_preset = cls is ModelConfig and all(field.name in sizes for sizes in PRESETS.values())
        return "**required** without `preset` or `run`" if is_of_preset else "**required**"
    value = schema.to_dict(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
    if isinstance(value, dict):
        return ""
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def changes_of(field: dataclasses.Field, where: str) -> str:
    later = field.metadata["later"]
    if where.startswith("data.validation"):
        return schema.ANY_TIME
    if where.startswith("phases") and later != schema.ANY_TIME:
        return PHASES
    return later or "no"


def inner(hint) -> type | None:
    """The dataclass inside `hint`, through lists and alternatives; None where there is none."""
    for kind in kinds_of(hint)[0]:
        if typing.get_origin(kind) in (list, tuple):
            kind = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(kind) and kind is not Objective:
            return kind
    return None


def is_list(hint) -> bool:
    return any(typing.get_origin(kind) in (list, tuple) for kind in kinds_of(hint)[0])


def section(cls: type, where: str, level: int, seen: dict[type, str]) -> list[str]:
    """The heading, head and table of a dataclass, then those of the mappings in it. seen: class -> where it stands."""
    head = re.sub(r"\(docs/([\w-]+\.md)\)", r"([\1](\1))", " ".join(inspect.getdoc(cls).split()))
    lines = [f"{'#' * level} `{where}`", "", head, "",
             "| key | type | default | meaning | changes |", "|---|---|---|---|---|"]
    below, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = field.metadata.get("key", field.name), hints[field.name]
        at, part = f"{where}.{key}" + (".N" if is_list(hint) else ""), inner(hint)
        if "meaning" not in field.metadata:
            raise SystemExit(f"{where}.{key}: {cls.__name__} does not say what it means; declare it by schema.key(...)")
        meaning = field.metadata["meaning"]
        if part and part in seen:
            meaning += f" (keys: [`{seen[part]}`](#{anchor(seen[part])}))"
        elif part:
            seen[part] = at
            below += section(part, at, level + 1, seen)
        changes = "" if part and not is_list(hint) else changes_of(field, where)  # else its own keys say it
        lines.append(f"| `{key}` | {name_of(hint)} | {default_of(cls, field)} | {meaning} | {changes} |")
    return [*lines, "", *below]


def anchor(heading: str) -> str:
    """As GitHub and mkdocs make it of a heading in code."""
    return heading.replace(".", "").replace(" ", "-").replace("(", "").replace(")", "").lower()


def page() -> str:
    """The whole page."""
    lines, hints = [HEAD.rstrip("\n"), ""], typing.get_type_hints(Config)
    seen = {inner(hints[field.name]): field.name for field in dataclasses.fields(Config)}
    for field in dataclasses.fields(Config):
        where = field.name + (".N" if is_list(hints[field.name]) else "")
        lines += section(inner(hints[field.name]), where, 2, seen)
        if field.name == "model":
            lines += ["Presets:", "", *(f"- `{name}`: " + ", ".join(f"{key} {value}" for key, value in sizes.items())
                                        for name, sizes in PRESETS.items()), ""]
        if field.name == "phases":
            lines += ["### `phases.N.objective`", "", "What each objective does: [objectives.md](objectives.md).", ""]
            for name, cls in sorted(OBJECTIVES.items()):
                if dataclasses.fields(cls):
                    own = {kind: place for kind, place in seen.items() if "objective" not in place}
                    lines += section(cls, f"phases.N.objective ({name})", 4, own)
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE}: not up to date; run python tools/config_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
