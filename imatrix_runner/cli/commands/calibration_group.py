"""``calibration``: commands for the texts that imatrices are collected from."""

from __future__ import annotations

import click

from imatrix_runner.cli.commands.calibration_build import build
from imatrix_runner.cli.commands.calibration_inspect import inspect
from imatrix_runner.cli.commands.calibration_sets import fetch, list_command
from imatrix_runner.cli.help_context import PageGroup


@click.group(cls=PageGroup)
def calibration() -> None:
    """Calibration texts: list, build, inspect, fetch."""


for command in (list_command, build, inspect, fetch):
    calibration.add_command(command)
