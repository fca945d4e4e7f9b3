"""Help is complete, quick, and costs no import that it does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from children import python
from command_line import PROGRAM, RunCommand
from conftest import Cli  # type: ignore[attr-defined]

from imatrix_runner import __version__
from imatrix_runner.cli.main import cli as root

HEAVY = ("numpy", "gguf", "rich", "huggingface_hub", "psutil", "httpx2", "msgspec")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and subcommand with the words that lead to it."""
    with click.Context(group) as ctx:
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            assert command is not None
            yield (*path, name), command
            if isinstance(command, click.Group):
                yield from commands(command, (*path, name))


EVERY = dict(commands(root))
