"""From YAML to typed, nested dataclasses, with errors that name the key to change.

    1. `load_yaml(path)`            file -> dict, syntax errors with file and line
    2. `apply_override(d, "a.b=1", Config)`   dotted command-line overrides into that dict
    3. `build(Config, d)`           dict -> dataclass, unknown keys and wrong types refused by their full name
    4. `to_dict(config)`            dataclass -> plain dict, for writing the resolved config

A field says with `key(...)` what it means, and whether it may change in a run that has begun: docs/config.md is made of
that (tools/config_reference.py). A dataclass checks its own values in `__post_init__` by raising
`ValueError("key: what is wrong")`; `build` turns that into a `UserError` with the full dotted name in front.

Why not OmegaConf, pydantic or dacite: one line for a mistake, with the dotted key and the nearest known one; 5e-4 and
1e9 as YAML's users mean them; overrides whose paths are taken as they stand: each of them would need that on top.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_encdec.platform.errors import UserError

# When a key may be given another value, in a run that has begun. Left out: not any more, once the steps are done that
# it decided; under `phases` that is when the phase begins.
ANY_TIME = "any time"
SAME_RATES = "while the learning rates of finished steps stay the same"
SAME_CONTENT = "to another path with the same content"
_NEAR, _AS_NEAR, _STEM = 0.6, 0.15, 4  # likeness of two names from 0 to 1; letters that a word and a name begin with


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a float (YAML 1.1 wants 5.0e-4) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
                              list("-+0123456789."))


def key(meaning: str, default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING,
        name: str | None = None, later: str | None = None) -> Any:
    """A field of a config. meaning: a sentence for its user. default, factory: as of `dataclasses.field`. name: in
    YAML, where it cannot be the field's (`from`). later: when it may change in a run that has begun, see `ANY_TIME`."""
    metadata = {"meaning": meaning, "later": later} | ({"key": name} if name else {})
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML `text`; a syntax error becomes a `UserError` that gives `name`, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None


def load_yaml(path: str | Path) -> dict:
    """Read the mapping in the YAML file at `path`."""
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the config: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of sections (run:, data:, phases:, ...), found {_kind(data)}")
    return data


def apply_override(data: dict, override: str, cls: type) -> None:
    """Set one `dotted.key=value` in `data`, in place; list items are addressed by number (`phases.1.steps=20`).
    Where `cls`, the dataclass of `data`, wants a string (a path), the value is taken as it stands; else it is YAML."""
    key, equals, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected dotted.key=value")
    where = f"override {override!r}"
    set_key(data, key, _value(text, _type_of(cls, key.split(".")), where), where)


def set_key(data: dict, key: str, value: Any, where: str | None = None) -> None:
    """Set the dotted `key` in `data`, in place, as `apply_override` does. where: what messages call it."""
    if not isinstance(key, str):
        raise unexpected("a dotted key", key, "override")
    parts: list = key.split(".")
    where, node = where or f"override {key!r}", data
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"{where}: {'.'.join(parts[:depth + 1])} is not an item of a list of {len(node)}")
            part = int(part)
        elif not isinstance(node, dict):
            raise UserError(f"{where}: {'.'.join(parts[:depth])} is {_kind(node)}, it has no keys")
        elif node.get(part) is None:
            node[part] = {}
        if depth < len(parts) - 1:
            node = node[part]
    node[part] = value


def _type_of(hint: Any, parts: list[str]) -> Any:
    """The type of the value under the dotted key `parts`; Any where it cannot be told."""
    for part in parts:
        kinds, _ = _kinds(hint)
        origin, arguments = typing.get_origin(kinds[0]), typing.get_args(kinds[0])
        if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]):
            hint = {**getattr(kinds[0], "YAML_KEYS", {}), **_hints(kinds[0])}.get(part, Any)
        elif len(kinds) == 1 and origin in (list, tuple, dict) and arguments:
            hint = arguments[origin is dict]
        else:
            return Any
    return hint


def _kinds(hint: Any) -> tuple[list, bool]:
    """The types in a hint, and whether None is among them, which the list leaves out."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return [hint], False
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds, len(kinds) < len(typing.get_args(hint))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields by their names in YAML."""
    hints = typing.get_type_hints(cls)
    return {_key(field): hints[field.name] for field in dataclasses.fields(cls)}


def _key(field: dataclasses.Field) -> str:
    return field.metadata.get("key", field.name)


def _value(text: str, hint: Any, where: str) -> Any:
    """What the `text` after = means where a value of the type `hint` is wanted."""
    kinds, may_be_none = _kinds(hint)
    if text and kinds == [str]:
        if may_be_none and text in ("null", "~"):
            return None
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""  # as it would be in the file
        if not quoted or os.path.lexists(text):
            return text
    return parse_yaml(text, where) if text else None


def build(cls: type, data: Any, where: str = "") -> Any:
    """Build dataclass `cls` from the mapping `data`; `where` is the dotted name of that mapping. A key of
    `cls.RETIRED` is passed over where it is null, as the config.yaml of a run of an earlier version has it."""
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise unexpected("a mapping of keys", data, where or "config")
    hints, fields = _hints(cls), {_key(field): field for field in dataclasses.fields(cls)}
    for key in data:
        if key in (retired := getattr(cls, "RETIRED", {})):
            if data[key] is not None:
                raise UserError(f"{_join(where, key)}: is gone; {retired[key]}")
        elif key not in fields:
            raise UserError(f"{_join(where, key)}: unknown key{_nearest(str(key), fields)}")
    if absent := _absent(cls, data, where):
        raise UserError(f"{', '.join(absent)}: missing; every config must give {'it' if len(absent) == 1 else 'them'}")
    values = {fields[key].name: _convert(hints[key], value, _join(where, key)) for key, value in data.items()
              if key in fields}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(_join(where, str(error))) from None


def _absent(cls: type, data: dict, where: str) -> list[str]:
    """The keys that `data` lacks and a config of `cls` must have, those inside its sections too."""
    found = []
    for field in dataclasses.fields(cls):
        key, kinds = _key(field), _kinds(_hints(cls)[_key(field)])[0]
        given = data.get(key)
        required = key not in data and field.default is field.default_factory is dataclasses.MISSING
        inside = []
        if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]) and not hasattr(kinds[0], "from_yaml") and (
                required or isinstance(given, dict)):
            inside = _absent(kinds[0], given or {}, _join(where, key))
        found += inside or [_join(where, key)] * required
    return found


def at_least(config: Any, bound: float, *names: str) -> None:
    """For `__post_init__`: the numbers `names` of `config`, where given, are not below `bound`."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value >= bound:
            raise ValueError(f"{name}: {value} is not at least {bound}")


def above(config: Any, bound: float, *names: str) -> None:
    """The same for numbers that have to be more than `bound`."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value > bound:
            raise ValueError(f"{name}: {value} is not above {bound}")


def to_dict(config: Any) -> Any:
    """The plain dict/list/scalar form of a config, a copy; `build` of it gives an equal config. Paths become strings
    and numbers of NumPy Python's."""
    if hasattr(config, "to_yaml"):
        return config.to_yaml()
    if dataclasses.is_dataclass(config):
        return {_key(field): to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, os.PathLike):
        return os.fsdecode(config)
    return config.item() if getattr(config, "shape", None) == () else config


def _convert(hint: Any, value: Any, where: str) -> Any:
    kinds, may_be_none = _kinds(hint)
    if hint is Any or (value is None and may_be_none):
        return value
    if len(kinds) > 1:
        return _convert_to_one_of(kinds, value, where)
    hint = kinds[0]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return one_of(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        return getattr(hint, "from_yaml", lambda value, where: build(hint, value, where))(value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise unexpected("a list", value, where)
        if origin is list or Ellipsis in arguments:
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise UserError(f"{where}: expected {len(arguments)} items, found {len(value)}")
        return origin(_convert(kind, item, f"{where}.{i}")
                      for i, (kind, item) in enumerate(zip(arguments, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise unexpected("a mapping", value, where)
        return {key: _convert(arguments[1], item, _join(where, key)) for key, item in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_to_one_of(kinds: list, value: Any, where: str) -> Any:
    for kind in kinds:
        try:
            return _convert(kind, value, where)
        except UserError:
            if isinstance(value, dict) and dataclasses.is_dataclass(kind) or kind is float is type(value):
                raise  # what is wrong inside the mapping, or with the number
    raise unexpected(" or ".join(map(_name, kinds)), value, where)


def one_of(known: tuple, value: Any, where: str) -> Any:
    """`value`, the key `where`, if it is in `known`; a `UserError` that lists them if not."""
    if value in known and type(value) in {type(one) for one in known}:
        return value
    raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, known))}"
                    f"{_did_you_mean(str(value), dict.fromkeys(map(str, known), ''))}")


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is no finite number")
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e9 tokens
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise unexpected(_name(hint), value, where, "; put it in quotes" if hint is str and value is not None else "")


def unexpected(wanted: str, value: Any, where: str, way_out: str = "") -> UserError:
    """The error that at `where` something else is `wanted` than this value."""
    return UserError(f"{where}: expected {wanted}, found {_kind(value)} {value!r}{way_out}")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _nearest(word: str, fields: dict[str, dataclasses.Field]) -> str:
    meanings = {key: field.metadata.get("meaning", "") for key, field in fields.items()}
    return _did_you_mean(word, meanings) or f" (known: {', '.join(sorted(fields))})"


def _did_you_mean(word: str, known: dict[str, str]) -> str:
    """The names that `word` may stand for: the nearest, and all that are about as near, then with what each means; ""
    where none is near. known: name -> meaning."""
    likeness = {one: difflib.SequenceMatcher(None, one, word).ratio() for one in known}
    near = {one: ratio for one, ratio in likeness.items() if ratio >= _NEAR or one[:_STEM] == word[:_STEM] and
            len(word) >= _STEM}
    best = sorted((one for one in near if near[one] >= max(near.values()) - _AS_NEAR), key=near.get)[-3:]
    best = [one for one in known if one in best]
    told = [repr(one) + (f" ({known[one].split(';')[0]})" if known[one] and len(best) > 1 else "") for one in best]
    return f"; did you mean {' or '.join(told)}?" if best else ""


def _kind(value: Any) -> str:
    kinds = {type(None): "nothing", bool: "a boolean", int: "an integer", float: "a number",
             str: "a string", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), type(value).__name__)


def _name(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))
