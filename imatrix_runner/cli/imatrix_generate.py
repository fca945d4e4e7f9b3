"""``imatrix generate``: the matrix alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.options import (
    collect_options,
    dry_run_option,
    environment_options,
    environment_request,
    force_option,
    imatrix_request,
    output_options,
    source_options,
    source_request,
    threads_option,
)
from imatrix_runner.cli.run_cmd import perform
from imatrix_runner.cli.settings import SettingsCommand
from imatrix_runner.workflow.request import RunRequest


@click.command(cls=SettingsCommand, takes_extra=True)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write it (default: imatrix.gguf in the model's workspace).",
)
@collect_options
@threads_option
@source_options
@environment_options
@force_option
@dry_run_option
@output_options
@click.pass_obj
def generate(invocation: Invocation, /, model: str, out: Path | None, **options: Any) -> int:
    """Compute the imatrix of MODEL over a calibration text, resumable; no quantisation.

    Options after -- go to llama-imatrix unread.

    \b
    imatrix-runner imatrix generate model-BF16.gguf -f medical.txt -o medical.gguf -ngl 99
    """
    request = RunRequest(
        source_request(model, options),
        environment_request(options, invocation),
        imatrix_request(options, invocation.extra, mode="generate", out=out.absolute() if out is not None else None),
        None,
    )
    return perform(request, options)
