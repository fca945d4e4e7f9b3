"""``calibration``: the texts that matrices are made from."""

from __future__ import annotations

import click

from imatrix_runner.cli.calibration_build import build
from imatrix_runner.cli.calibration_inspect import inspect
from imatrix_runner.cli.calibration_sets import fetch, list_command


@click.group()
def calibration() -> None:
    """Calibration texts: list, build, inspect, fetch."""


for command in (list_command, build, inspect, fetch):
    calibration.add_command(command)
