"""Values that Python gives for a verb's options: read and refused as the verb's own parser has it.

    `read("preprocess", on_error="stop", share="1/4")` -> {"on_error": "stop", "share": (1, 4)}

The types and choices are those that the verb's `add_arguments` declares, so that they are written down once.
"""

import argparse
import importlib
from collections.abc import Iterable
from typing import Any

from megatron_encdec.cli import VERBS
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError


class _Options(argparse.ArgumentParser):
    """A parser that can be asked for the options it was given."""

    def __init__(self):
        super().__init__(add_help=False)
        self.by_name: dict[str, argparse.Action] = {}

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.by_name[action.dest] = action
        return action


def read(verb: str, **given: Any) -> dict[str, Any]:
    """`given` as the verb's parser would have it from the command line: numbers of NumPy and paths too, one value
    where several may stand, None for the default. Names that are no options of the verb are left as they are. Raises
    `UserError` for a value that the command line could not give."""
    options = _Options()
    importlib.import_module(VERBS[verb][0]).add_arguments(options)
    return {name: _read(options.by_name[name], value) if name in options.by_name else value
            for name, value in given.items()}


def _read(action: argparse.Action, value: Any) -> Any:
    where, value = (action.option_strings or [action.dest])[-1], schema.to_dict(value)
    if value is None:
        return _refuse(where, "a string", value) if action.required else action.default
    if action.nargs == 0:  # a switch
        return value if isinstance(value, bool) else _refuse(where, "true or false", value)
    if action.nargs == "+":
        several = isinstance(value, Iterable) and not isinstance(value, str)
        return [_one(action, one, where) for one in (value if several else [value])]
    return _one(action, value, where)


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    """A single value. action.type reads words, so it is given one: what it takes as a word it takes as a value."""
    if isinstance(action.default, tuple) and isinstance(value, list):
        value = "/".join(map(str, value))  # (1, 4), which the command line has as 1/4
    kind = action.type or str
    name = {int: "an integer", float: "a number", str: "a string"}.get(kind, "a string")
    if kind in (int, float) and isinstance(value, (bool, list)) or kind not in (int, float) and not isinstance(
            value, str):
        _refuse(where, name, value)
    try:
        found = kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where}: {error}") from None
    except ValueError:
        _refuse(where, name, value)
    return schema.one_of(tuple(action.choices), found, where) if action.choices else found


def _refuse(where: str, wanted: str, value: Any) -> None:
    raise schema.unexpected(wanted, value, where)
