"""``imatrix``: importance matrices on their own."""

from __future__ import annotations

import click

from imatrix_runner.cli.imatrix_check import check
from imatrix_runner.cli.imatrix_files import convert, merge
from imatrix_runner.cli.imatrix_generate import generate
from imatrix_runner.cli.imatrix_published import fetch, find
from imatrix_runner.cli.imatrix_stats import stats


@click.group()
def imatrix() -> None:
    """Importance matrices: generate, find, fetch, check, merge, convert, look inside."""


for command in (generate, find, fetch, check, stats, merge, convert):
    imatrix.add_command(command)
