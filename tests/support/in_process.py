"""The command line inside the test's own process: for what it says, where a process of its own would only cost time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from imatrix_runner.cli.main import cli as root
from imatrix_runner.cli.main import run_cli
from support.command_line import Ran


class CommandLine:
    """``cli("run", model)`` is what ``imatrix-runner run MODEL`` says, and its exit code."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> Ran:
        self._capture.readouterr()
        code = run_cli([str(argument) for argument in arguments])
        said = self._capture.readouterr()
        return Ran(code, said.out, said.err)


def every_command() -> dict[tuple[str, ...], click.Command]:
    """Every command and subcommand, by the words that lead to it."""

    def within(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        ctx = click.Context(group)
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            assert command is not None
            yield (*path, name), command
            if isinstance(command, click.Group):
                yield from within(command, (*path, name))

    return dict(within(root, ()))
