"""Which code this is: a hash over the package's own files, equal where an installation is."""

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def code_hash() -> str:
    """Hex sha256 over names and contents of the package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
