"""Writes Markdown around untrusted texts: everything that is not marked as :class:`Markdown` is escaped.

For CommonMark with GitHub's tables, strikethrough and autolinks and the hub's formulas between ``$$``: the text is shown as it
is, and none of it becomes markup, a cell border, HTML or a link.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from imatrix_runner.safe_text import printable, shown_text

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_INLINE = 300
"""Most characters of an untrusted name or sentence."""
MAX_BLOCK = 20_000
"""Most characters of a block of code."""

# Entities where a backslash is not enough: table borders inside code, formulas that are found before Markdown is parsed.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "|": "&#124;", "$": "&#36;"}
_SPECIAL = re.compile(r"[&<>\\|$]|[`*\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def inline(text: object) -> Markdown:
    """A text within a line or a table's cell: line breaks become spaces, a long text ends with an ellipsis."""
    return Markdown(_SPECIAL.sub(_escaped, _line(str(text))))


def _line(text: str) -> str:
    plain = printable(" ".join(text[: 4 * MAX_INLINE].split()))
    return plain if len(plain) <= MAX_INLINE else plain[: MAX_INLINE - 1] + "…"


def _escaped(match: re.Match[str]) -> str:
    found = match[0]
    return _ENTITIES.get(found) or (f"&#{ord(found)};" if found in ":." else f"\\{found}")


def code(text: str) -> Markdown:
    """A span of code; not for tables, where a ``|`` in it would be a border."""
    plain = _line(text)
    if not plain:
        return Markdown("")
    marks = _longer_run(plain, 1)
    space = " " if plain[0] in "` " or plain[-1] in "` " else ""
    return Markdown(f"{marks}{space}{plain}{space}{marks}")


def fenced(text: str, language: str = "") -> Markdown:
    """A block of code with any text in it; line breaks and tabs stay."""
    plain = shown_text(text, MAX_BLOCK).removesuffix("\n")
    marks = _longer_run(plain, 3)
    return Markdown(f"{marks}{language}\n{plain}\n{marks}")


def link(text: object, address: str) -> Markdown:
    """A link to an ``http(s)`` address, or to a file next to the card (``./…``)."""
    return Markdown(f"[{inline(text)}]({quote(address, safe='/:?=&%#+,;@~.-_', errors='replace')})")


def joined(texts: Iterable[Markdown]) -> Markdown:
    return Markdown(", ".join(texts))


def file_address(name: str) -> str:
    """The relative address of a file next to the card."""
    return f"./{quote(name[:MAX_INLINE], errors='replace')}"


def _longer_run(text: str, least: int) -> str:
    """A run of backticks longer than any in the text, and at least ``least``."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def markdown_templates() -> Environment:
    """An environment for this folder's templates that escapes values with :func:`inline` unless they are :class:`Markdown`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def finalize(value: Any) -> str:
        return value if isinstance(value, Markdown) else inline(value)

    return Environment(  # noqa: S701 -- finalize escapes, for Markdown instead of HTML
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
