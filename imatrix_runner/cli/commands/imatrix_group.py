"""``imatrix``: commands for importance matrices."""

from __future__ import annotations

import click

from imatrix_runner.cli.commands.imatrix_check import check
from imatrix_runner.cli.commands.imatrix_files import convert, merge
from imatrix_runner.cli.commands.imatrix_generate import generate
from imatrix_runner.cli.commands.imatrix_published import fetch, find
from imatrix_runner.cli.commands.imatrix_stats import stats
from imatrix_runner.cli.help_context import PageGroup


@click.group(cls=PageGroup)
def imatrix() -> None:
    """Importance matrices: generate, find, fetch, check, merge, convert, look inside."""


for command in (generate, find, fetch, check, stats, merge, convert):
    imatrix.add_command(command)
