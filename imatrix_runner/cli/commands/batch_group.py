"""``batch``: a list of models, worked through. ``batch FILE`` is ``batch run FILE``."""

from __future__ import annotations

import click

from imatrix_runner.cli.commands.batch_add import add
from imatrix_runner.cli.commands.batch_run import run_command
from imatrix_runner.cli.commands.batch_status import status_command
from imatrix_runner.cli.help_context import HELP_OPTIONS, PageGroup

_DEFAULT = "run"


class _BatchGroup(PageGroup):
    """A group whose first word may also be the argument or an option of ``run``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in HELP_OPTIONS:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_BatchGroup, context_settings={"help_option_names": list(HELP_OPTIONS)})
def batch() -> None:
    """Work through a list of models: run, add, status.

    imatrix-runner batch FILE is short for imatrix-runner batch run FILE.
    """


for each in (run_command, add, status_command):
    batch.add_command(each)
