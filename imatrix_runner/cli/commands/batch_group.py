"""``batch``: a list of models, worked through. ``batch FILE`` is ``batch run FILE``."""

from __future__ import annotations

import click

from imatrix_runner.cli.commands.batch_add import add
from imatrix_runner.cli.commands.batch_run import run_command
from imatrix_runner.cli.commands.batch_status import status_command
from imatrix_runner.cli.help_context import HELP_OPTIONS, PageGroup

_DEFAULT = "run"


class RunByDefault(PageGroup):
    """A group whose first word may also be the argument or an option of ``run``."""

    def whole(self, words: list[str]) -> list[str]:
        """The words with the name of the command that they leave out."""
        known = not words or words[0] in self.commands or words[0] in HELP_OPTIONS
        return words if known else [_DEFAULT, *words]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.whole(args))


@click.group(cls=RunByDefault, context_settings={"help_option_names": list(HELP_OPTIONS)})
def batch() -> None:
    """Work through a list of models: run, add, status.

    imatrix-runner batch FILE is short for imatrix-runner batch run FILE.
    """


for each in (run_command, add, status_command):
    batch.add_command(each)
