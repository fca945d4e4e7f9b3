"""The layout of help pages, by cloup: sections with aligned columns, wrapped for the terminal, one column if it is narrow."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence

import click
from cloup import HelpFormatter, HelpTheme, Style
from cloup.formatting import HelpSection

_WIDEST = 120
_WIDE = 100
_CONTINUED = " \\"
_KEPT = "\0"  # a space at which lines are not wrapped
_THEME = HelpTheme(heading=Style(bold=True), col1=Style(fg="cyan"))


def page_formatter(width: int | None, max_width: int | None) -> HelpFormatter:
    """A formatter for the terminal's width, at most 120 columns; on wide terminals options get more room."""
    max_width = max_width or _WIDEST
    columns = width or min(max_width, shutil.get_terminal_size().columns)
    return HelpFormatter(
        width=width, max_width=max_width, col1_max_width=44 if columns >= _WIDE else 30, col2_min_width=30, theme=_THEME
    )


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines to copy; long ones are continued before an option, with a backslash as in a shell."""
    with formatter.section("Examples"):
        indent = " " * formatter.current_indent
        for example in examples:
            lines = textwrap.wrap(
                re.sub(r" (?!-)", _KEPT, example),
                formatter.width - len(_CONTINUED),
                initial_indent=indent,
                subsequent_indent=f"{indent}    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            formatter.write(f"{_CONTINUED}\n".join(lines).replace(_KEPT, " ") + "\n")


def write_options(formatter: click.HelpFormatter, sections: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Write each section's options, spellings and help, under its heading."""
    assert isinstance(formatter, HelpFormatter)
    formatter.write_many_sections([HelpSection(heading, rows) for heading, rows in sections.items()])
