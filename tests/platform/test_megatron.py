"""The one module that imports megatron.core."""

import ast
from pathlib import Path

import megatron_encdec

PACKAGE = Path(megatron_encdec.__file__).parent


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_no_other_module_imports_megatron_core():
    users = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")
             if any(name == "megatron" or name.startswith("megatron.") for name in imported(path))}
    assert users == {"platform/megatron.py"}
