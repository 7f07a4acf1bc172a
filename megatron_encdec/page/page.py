"""A report as one HTML file that needs no network: style and figures (as vectors) are inside, there is no script.

    1. `page(...)`           facts and sections -> the text of index.html, whose skeleton and style are page.html
    2. `write_report(...)`   all files of a report into a folder

Texts of ours are Markdown; names and numbers that others wrote are only ever escaped.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from megatron_encdec import __version__
from megatron_encdec.page.drawing import Picture
from megatron_encdec.page.tables import DAGGER, Table, text_of
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_atomic, write_json_atomic

RECORD = "report.json"  # the names of a report's files
FOLDED_ROWS = 40  # a longer table is folded away, except the first of the page
# No HTML, and nothing that a browser would fetch or follow.
_MARKDOWN = MarkdownIt("commonmark", {"html": False})
_MARKDOWN.disable(["html_block", "html_inline", "image", "link", "autolink"])


class Fact(NamedTuple):
    """A number that stands large at the top: `count` things of the name `name`."""

    count: int
    name: str
    is_warning: bool = False


@dataclass(frozen=True)
class Section:
    """`name` is its anchor and `text` Markdown; `tables` stand above the pictures, `details` folded away below them."""

    name: str
    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    details: Sequence[Table] = ()


def page(title: str, subtitle: str, facts: Sequence[Fact], sections: Sequence[Section], footer: str) -> str:
    """The whole file; sections without anything in them are left out."""
    sections = [one for one in sections if one.text or one.tables or one.pictures or one.details]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters |= {"markdown": lambda text: Markup(_MARKDOWN.render(text)),
                            "inline_markdown": lambda text: Markup(_MARKDOWN.renderInline(text)),
                            "text_of": text_of, "base64": lambda data: base64.b64encode(data).decode()}
    return environment.get_template("page.html").render(
        title=title, subtitle=subtitle, facts=facts, sections=sections, folded_rows=FOLDED_ROWS, dagger=DAGGER,
        footer=f"megatron-encdec {__version__}. {footer}")


def write_report(folder: Path, files: Mapping[Path, bytes], option: str) -> None:
    """Write `files`, by their paths in `folder`, each complete or absent and in this order. Those of an earlier report
    that this one has no use for are removed, and nothing else. Raises `UserError`, which names the `option` of the
    command, where the folder cannot be written, or holds a file of one of these names that no report wrote."""
    try:
        earlier = {Path(name) for name in json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        earlier = set()  # there was none, or its record is not readable
    if foreign := [name for name in files if name not in earlier and os.path.lexists(folder / name)]:
        raise UserError(f"{option} {folder}: {foreign[0]} is there, and no report wrote it ({RECORD} does not list "
                        "it); name another folder, or move it away")
    try:
        for inner in {path.parent for path in files}:
            (folder / inner).mkdir(parents=True, exist_ok=True)
            for old in (folder / inner).iterdir() if inner != Path() else ():
                if old.relative_to(folder) in earlier - files.keys():
                    old.unlink()
        write_json_atomic(folder / RECORD, {"files": sorted(map(str, files))})
        for name, data in files.items():
            write_atomic(folder / name, data)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written ({error.strerror}); name another folder") from None
