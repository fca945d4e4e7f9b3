"""Help pages of commands and groups. cloup, which lays them out, is imported only for them: the import takes 50 ms."""

from __future__ import annotations

import os

import click

HELP_OPTIONS = ("-h", "--help")


def colour() -> bool | None:
    """Return False if NO_COLOR is set or the terminal is dumb; else None: Click then colours on terminals only."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown") else None


class PageContext(click.Context):
    """A context whose help pages are laid out by :mod:`imatrix_runner.cli.views.help_page`."""

    def make_formatter(self) -> click.HelpFormatter:
        from imatrix_runner.cli.views.help_page import page_formatter

        return page_formatter(self.terminal_width, self.max_content_width)


class PageCommand(click.Command):
    context_class = PageContext


class PageGroup(click.Group):
    context_class = PageContext

    def summaries(self, ctx: click.Context) -> list[tuple[str, str]]:
        """Each command with the first sentence of its help."""
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        return [(name, _first_sentence(each.help or "")) for name, each in found if each is not None]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(self.summaries(ctx))


def _first_sentence(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."
