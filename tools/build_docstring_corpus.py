"""The embedded corpus: `python tools/build_docstring_corpus.py OUT.jsonl`, so that a demo needs no download.

    1. list the `.py` files of site-packages, sorted
    2. processes parse each with `ast` (nothing is imported or run) and clean its docstrings
    3. repeated texts are dropped, the others written as JSON lines, in file order

A line is `{"text", "source", "library"}`: `source` is "package/module.py:qualified.name" (the file alone for a module's
docstring), `library` the top-level package. With pinned package versions the result is the same bytes on every machine.
An OUT.jsonl that is there already is complete, and is kept.
"""

import argparse
import ast
import gc
import hashlib
import inspect
import json
import multiprocessing
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from megatron_encdec.platform.children import available_cores
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.progress import Progress
from megatron_encdec.rundir.files import replace_durably

LONGER_THAN = 200  # characters, after cleaning: shorter docstrings are mostly signatures
FILES_AT_ONCE = 32
EXCLUDED = ("megatron_encdec",)  # our own text would change with every commit
EXCLUDED_PREFIXES = ("__editable__", "__pycache__", ".")
EXCLUDED_SUFFIXES = (".dist-info", ".egg-info")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def build_corpus(output: Path, root: Path, workers: int) -> str:
    """Write `output` from the packages in `root`; what to say of it. Raises `UserError` where there is no docstring."""
    if not root.is_dir():
        raise UserError(f"{root}: no such directory (site-packages for the docstring corpus)")
    sources = list_sources(root)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with (open(temporary, "wb") as file, Progress("docstrings", len(sources)) as progress,
              ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=prepare) as pool):
            answers = pool.map(partial(extract, root), sources, chunksize=FILES_AT_ONCE)
            counts = write(file, answers, progress)
            file.flush()
            os.fsync(file.fileno())
        if not counts["documents"]:
            raise UserError(f"{root}: no docstring longer than {LONGER_THAN} characters in its {len(sources)} files")
        replace_durably(temporary, output)
    except BrokenProcessPool:
        raise UserError("a reading process ended too early (most often the system running out of memory); try fewer "
                        "--workers") from None
    finally:
        temporary.unlink(missing_ok=True)
    return (f"{output}: {counts['documents']:,} docstrings, {counts['characters']:,} characters, from "
            f"{len(sources):,} files ({counts['unreadable']:,} not readable, {counts['repeated']:,} repeats dropped)")


def write(file, answers: Iterator[list[tuple[str, str]] | None], progress: Progress) -> dict[str, int]:
    """The lines of all files' docstrings, each text once; `answers` are those of `extract`, in file order."""
    seen: set[bytes] = set()
    counts = dict.fromkeys(("documents", "characters", "unreadable", "repeated"), 0)
    for done, found in enumerate(answers, start=1):
        counts["unreadable"] += found is None
        for text, source in found or ():
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            if digest in seen:
                counts["repeated"] += 1
                continue
            seen.add(digest)
            counts["documents"] += 1
            counts["characters"] += len(text)
            library = source.split(":")[0].split("/")[0].removesuffix(".py")
            line = {"text": text, "source": source, "library": library}
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
        progress.update(done, f"{len(seen):,} docstrings")
    return counts


def list_sources(root: Path) -> list[str]:
    """Paths, relative to `root` with forward slashes, of the Python files to read, sorted."""
    sources = []
    for folder, subfolders, names in os.walk(root):
        top, inside = Path(folder) == root, Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if not is_excluded(name, top)]
        sources += [(inside / name).as_posix() for name in names if name.endswith(".py") and not is_excluded(name, top)]
    return sorted(sources)


def is_excluded(name: str, top: bool) -> bool:
    """Whether a file or folder is not read; `top`: it is directly in site-packages."""
    return name.startswith(EXCLUDED_PREFIXES) or name.endswith(EXCLUDED_SUFFIXES) or (top and name in EXCLUDED)


def prepare() -> None:
    """What a reading process does first."""
    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
    gc.disable()  # syntax trees hold no cycles; looking for some costs a sixth of the time


def extract(root: Path, path: str) -> list[tuple[str, str]] | None:
    """(text, source) of each long docstring in a file; None where it is not valid Python."""
    try:
        tree = ast.parse((root / path).read_bytes())
        return [(text, f"{path}:{name}" if name else path) for name, text in docstrings(tree, ())]
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return None


def docstrings(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(qualified name, cleaned text) of each long docstring in `node`, from the top down.

    Nested definitions are found wherever statements can stand (in `if`, `try`, `with` bodies too).
    """
    if isinstance(node, DEFINITIONS) and (text := docstring(node)):
        yield ".".join(names), text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            yield from docstrings(child, (*names, child.name))
        elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)) and hasattr(child, "body"):
            yield from docstrings(child, names)


def docstring(node: ast.AST) -> str | None:
    """The cleaned docstring of a definition, None where it is short or cannot be a document."""
    if not (node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            and isinstance(node.body[0].value.value, str) and len(node.body[0].value.value) > LONGER_THAN):
        return None
    text = inspect.cleandoc(node.body[0].value.value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a string literal may hold half of a surrogate pair; a document may not
        return None
    return text if len(text) > LONGER_THAN else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--site-packages", type=Path, default=sysconfig.get_path("purelib"), metavar="DIR",
                        help="whose docstrings (default: this environment's packages)")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N",
                        help="reading processes (default: one a core)")
    arguments = parser.parse_args()
    if arguments.output.exists():
        print(f"{arguments.output}: is there already")
        return 0
    try:
        print(build_corpus(arguments.output, Path(arguments.site_packages), arguments.workers))
    except UserError as error:
        print(f"build_docstring_corpus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":  # its workers are new processes that import this module again
    raise SystemExit(main())
