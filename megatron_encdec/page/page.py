"""A report as one HTML file that needs no network: style and figures (as vectors) are inside, there is no script.

The skeleton and its style are page.html. Texts of ours are Markdown; names and numbers that others wrote are only
ever escaped.

    1. `Section(...)`      a heading with text, tables and figures
    2. `page(...)`         sections -> the text of index.html
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from megatron_encdec import __version__
from megatron_encdec.page.drawing import Picture
from megatron_encdec.page.tables import DAGGER, Table, text_of

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
