"""From YAML to typed, nested dataclasses, with errors that name the key to change.

    1. `load_yaml(path)`            file -> dict, syntax errors with file and line
    2. `apply_override(d, "a.b=1", Config)`   dotted command-line overrides into that dict
    3. `build(Config, d)`           dict -> dataclass, unknown keys and wrong types refused by their full name
    4. `to_dict(config)`            dataclass -> plain dict, for writing the resolved config

A dataclass checks its own values in `__post_init__` by raising `ValueError("key: what is wrong")`; `build`
turns that into a `UserError` with the full dotted name in front.
"""

import dataclasses
import difflib
import os
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from megatron_encdec.platform.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a float (YAML 1.1 wants 5.0e-4) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


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
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the config: {error}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of sections (run:, data:, phases:, ...), "
                        f"found {_kind(data)}")
    return data


def apply_override(data: dict, override: str, cls: type) -> None:
    """Set one `dotted.key=value` in `data`, in place; list items are addressed by number (`phases.1.steps=20`).

    cls: the dataclass that `data` is for. Where it wants a string, such as a path, the value is taken as it stands;
    elsewhere it is YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected dotted.key=value")
    value = _value(text, _type_of(cls, key.split(".")), override)
    parts = key.split(".")
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = ".".join(parts[: depth + 1])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"override {override!r}: {here} is not an item of a list of {len(node)}")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise UserError(f"override {override!r}: {'.'.join(parts[:depth])} is {_kind(node)}, it has no keys")


def _type_of(hint: Any, parts: list[str]) -> Any:
    """The type of the value under the dotted key `parts`; Any where it cannot be told."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and len(kinds) == 1 and parts:
        hint, kinds = kinds[0], list(typing.get_args(kinds[0]))
    if not parts:
        return hint
    if dataclasses.is_dataclass(hint):
        names = {field.metadata.get("key", field.name): field.name for field in dataclasses.fields(hint)}
        hints = typing.get_type_hints(hint)
        if parts[0] not in names:
            return getattr(hint, "YAML_KEYS", {}).get(parts[0], Any)
        return _type_of(hints[names[parts[0]]], parts[1:])
    if typing.get_origin(hint) in (list, tuple, dict) and kinds:
        return _type_of(kinds[1 if typing.get_origin(hint) is dict else 0], parts[1:])
    return Any


def _value(text: str, hint: Any, override: str) -> Any:
    """What the `text` behind = means where a value of the type `hint` is wanted."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = set(typing.get_args(hint)) if is_union else {hint}
    if not text or str not in kinds or kinds - {str, type(None)}:
        return parse_yaml(text, f"override {override!r}") if text else None
    if type(None) in kinds and text in ("null", "~"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and not os.path.lexists(text):
        return parse_yaml(text, f"override {override!r}")  # quoted as it would be in the file
    return text


def build(cls: type, data: Any, where: str = "") -> Any:
    """Build dataclass `cls` from the mapping `data`; `where` is the dotted name of that mapping."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{where or 'config'}: expected a mapping of keys, found {_kind(data)} {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = {field.metadata.get("key", name): name for name, field in fields.items()}
    values = {}
    for key, value in data.items():
        if key not in names:
            raise UserError(f"{_join(where, key)}: unknown key{_nearest(str(key), names)}")
        values[names[key]] = _convert(hints[names[key]], value, _join(where, key))
    for key, name in names.items():
        field = fields[name]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in values and required:
            raise UserError(f"{_join(where, key)}: missing; every config must give it")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(_join(where, str(error))) from None


def to_dict(config: Any) -> Any:
    """The plain dict/list/scalar form of a config; `build` of it gives an equal config."""
    if hasattr(config, "to_yaml"):
        return config.to_yaml()
    if dataclasses.is_dataclass(config):
        return {field.metadata.get("key", field.name): to_dict(getattr(config, field.name))
                for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        if len(kinds) == 1:
            return _convert(kinds[0], value, where)
        for kind in kinds:
            try:
                return _convert(kind, value, where)
            except UserError as error:
                if isinstance(value, dict) and (dataclasses.is_dataclass(kind)):
                    raise error
        raise UserError(f"{where}: expected {_name(hint)}, found {_kind(value)} {value!r}")
    if origin is typing.Literal:
        return one_of(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        from_yaml = getattr(hint, "from_yaml", None)
        return from_yaml(value, where) if from_yaml else build(hint, value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {_kind(value)} {value!r}")
        if origin is tuple and Ellipsis not in arguments:
            if len(value) != len(arguments):
                raise UserError(f"{where}: expected {len(arguments)} items, found {len(value)}")
            return tuple(_convert(kind, item, f"{where}.{i}")
                         for i, (kind, item) in enumerate(zip(arguments, value, strict=True)))
        return origin(_convert(arguments[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, found {_kind(value)} {value!r}")
        return {key: _convert(arguments[1], item, _join(where, key)) for key, item in value.items()}
    return _convert_scalar(hint, value, where)


def one_of(known: tuple, value: Any, where: str) -> Any:
    """`value`, the key `where`, if it is in `known`; a `UserError` that lists them if not."""
    if value in known and type(value) in {type(one) for one in known}:
        return value
    raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, known))}"
                    f"{_nearest(str(value), [str(one) for one in known])}")


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e9 tokens
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    quoted = "; put it in quotes" if hint is str and value is not None else ""
    raise UserError(f"{where}: expected {_name(hint)}, found {_kind(value)} {value!r}{quoted}")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _nearest(word: str, known) -> str:
    known = [str(name) for name in known]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(sorted(known))})"


def _kind(value: Any) -> str:
    kinds = {type(None): "nothing", bool: "a boolean", int: "an integer", float: "a number",
             str: "a string", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), type(value).__name__)


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_name(kind) for kind in typing.get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return names.get(hint, str(hint))
