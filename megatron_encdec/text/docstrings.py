"""The embedded corpus: docstrings of the installed packages, so that a demo needs no download.

    1. list the `.py` files of site-packages, sorted
    2. workers parse each with `ast` (nothing is imported or run) and clean its docstrings
    3. the parent drops repeated texts and writes JSON lines, in file order

With pinned package versions the result is the same bytes on every machine.
"""

import ast
import gc
import hashlib
import inspect
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.platform.children import Pool, available_cores
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.progress import Progress
from megatron_encdec.rundir.files import replace_durably

LONGER_THAN = 200  # characters, after cleaning: shorter docstrings are mostly signatures
FILES_AT_ONCE = 32
EXCLUDED = ("megatron_encdec",)  # our own text would change with every commit
EXCLUDED_PREFIXES = ("__editable__", "__pycache__", ".")
EXCLUDED_SUFFIXES = (".dist-info", ".egg-info")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class DocstringCounts:
    """`files` read, `unreadable` ones (not valid Python), `documents` written, `repeated` ones dropped, and
    the `characters` of the documents."""

    files: int
    unreadable: int
    documents: int
    repeated: int
    characters: int


def build_docstring_corpus(output_jsonl: str | Path, site_packages: str | Path | None = None,
                           workers: int | None = None, progress: bool = True) -> DocstringCounts:
    """Write `{"text", "source", "library"}` lines for the docstrings under `site_packages`.

    `site_packages`: by default this environment's. `source` is "package/module.py:qualified.name" (the file
    alone for a module's docstring), `library` the top-level package. The file appears when complete. Raises
    `UserError` if the directory is not there or holds no docstring.
    """
    root = Path(site_packages or sysconfig.get_path("purelib"))
    if not root.is_dir():
        raise UserError(f"{root}: no such directory (site-packages for the docstring corpus)")
    files = list_sources(root)
    batches = [files[i : i + FILES_AT_ONCE] for i in range(0, len(files), FILES_AT_ONCE)]
    output = Path(output_jsonl)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with (open(temporary, "wb") as file, Progress("docstrings", len(files), progress) as shown,
              Pool(workers or available_cores()) as pool):
            pool.begin("megatron_encdec.text.docstrings:make_extractor", (str(root),))
            counts = _write(file, pool.map_ordered(batches), len(files), shown)
            if not counts.documents:
                raise UserError(f"{root}: no docstring longer than {LONGER_THAN} characters in its "
                                f"{len(files)} files")
            file.flush()
            os.fsync(file.fileno())
        replace_durably(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def _write(file, answers: Iterator[tuple[list, int, int]], total: int, shown: Progress) -> DocstringCounts:
    seen: set[bytes] = set()
    done = unreadable = repeated = characters = 0
    for found, files, failed in answers:
        for text, source in found:
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            if digest in seen:
                repeated += 1
                continue
            seen.add(digest)
            characters += len(text)
            line = {"text": text, "source": source, "library": library_of(source.split(":")[0])}
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
        done += files
        unreadable += failed
        shown.update(done, f"{len(seen):,} docstrings")
    return DocstringCounts(total, unreadable, len(seen), repeated, characters)


def list_sources(root: Path) -> list[str]:
    """Paths, relative to `root` with forward slashes, of the Python files to read, sorted."""
    sources = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_excluded(name, top=Path(folder) == root)]
        inside = Path(folder).relative_to(root)
        sources += [(inside / name).as_posix() for name in names
                    if name.endswith(".py") and not _is_excluded(name, top=Path(folder) == root)]
    return sorted(sources)


def _is_excluded(name: str, top: bool) -> bool:
    return (name.startswith(EXCLUDED_PREFIXES) or name.endswith(EXCLUDED_SUFFIXES)
            or (top and name in EXCLUDED))


def library_of(relative_path: str) -> str:
    """`numpy/linalg/__init__.py` -> `numpy`; `six.py` -> `six`."""
    return relative_path.split("/")[0].removesuffix(".py")


def make_extractor(root: str) -> Callable[[list[str]], tuple[list[tuple[str, str]], int, int]]:
    """The worker's function: paths -> ((text, source) of each docstring, files, unreadable files)."""
    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
    gc.disable()  # syntax trees hold no cycles; looking for some costs a sixth of the time

    def extract(paths: list[str]) -> tuple[list[tuple[str, str]], int, int]:
        found, failed = [], 0
        for path in paths:
            try:
                tree = ast.parse(Path(root, path).read_bytes())
                found += [(text, f"{path}:{name}" if name else path) for name, text in docstrings(tree, ())]
            except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
                failed += 1
        return found, len(paths), failed

    return extract


def docstrings(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(qualified name, cleaned text) of each long docstring in `node`, from the top down.

    Nested definitions are found wherever statements can stand (in `if`, `try`, `with` bodies too).
    """
    if isinstance(node, DEFINITIONS):
        text = _docstring(node)
        if text:
            yield ".".join(names), text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            yield from docstrings(child, (*names, child.name))
        elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)) and hasattr(child, "body"):
            yield from docstrings(child, names)


def _docstring(node: ast.AST) -> str | None:
    if not (node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            and isinstance(node.body[0].value.value, str) and len(node.body[0].value.value) > LONGER_THAN):
        return None
    text = inspect.cleandoc(node.body[0].value.value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a string literal may hold half of a surrogate pair; a document may not
        return None
    return text if len(text) > LONGER_THAN else None
