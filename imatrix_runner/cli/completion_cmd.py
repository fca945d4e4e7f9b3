"""``completion``: the script that makes the shell complete commands, options and level names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from imatrix_runner.cli.invocation import PROGRAM
from imatrix_runner.cli.main import cli


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script for SHELL.

    \b
    bash:  eval "$(imatrix-runner completion bash)"     in ~/.bashrc
    zsh:   eval "$(imatrix-runner completion zsh)"      in ~/.zshrc
    fish:  imatrix-runner completion fish | source      in config.fish
    """
    maker = get_completion_class(shell)
    assert maker is not None
    click.echo(maker(cli, {}, PROGRAM, "_IMATRIX_RUNNER_COMPLETE").source())
    return 0
