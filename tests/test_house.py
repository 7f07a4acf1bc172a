"""The order of the house: rooms import from rooms before them, nothing goes in a circle, a function fits a screen."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_encdec"
ROOMS = ("platform", "rundir", "page", "text", "data", "objectives", "model", "engine", "training", "interop",
         "inspection", "finetune", "study")
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
           for path in PACKAGE.rglob("*.py")}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def names_imported(path: Path) -> set[str]:
    """Names of modules, and of what is in them, that the file imports, wherever in it."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imports(path: Path) -> set[str]:
    """Our modules among them."""
    return names_imported(path) & MODULES.keys()


def room(module: str) -> str | None:
    return next((part for part in module.split(".")[1:2] if part in ROOMS), None)


def test_every_package_is_a_room():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} <= set(ROOMS)


def test_a_room_imports_only_from_rooms_before_it():
    upwards = [f"{module} imports {other}" for module, path in MODULES.items() for other in imports(path)
               if room(module) and room(other) and ROOMS.index(room(other)) > ROOMS.index(room(module))]
    assert not upwards


def test_no_import_goes_in_a_circle():
    root = PACKAGE.name  # read for its version, and it imports the functions when one is asked for
    graph = {module: imports(path) - {module, root} for module, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_one_module_imports_megatron_core():
    users = [module for module, path in MODULES.items()
             if any(f"{name}.".startswith("megatron.") for name in names_imported(path))]
    assert users == ["megatron_encdec.platform.megatron"]


def test_what_a_verb_prints_as_json_is_json():
    """NaN is none: json_text writes null."""
    printers = [module for module, path in MODULES.items() if "arguments.json" in path.read_text()]
    assert len(printers) > 3
    for module in printers:
        names = names_imported(MODULES[module])
        assert "megatron_encdec.platform.json_text.json_text" in names and "json" not in names, module


def test_a_function_fits_a_screen():
    long = [f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            for path in MODULES.values() for node in nodes(path)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60]
    assert not long
