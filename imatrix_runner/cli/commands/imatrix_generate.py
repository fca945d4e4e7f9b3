"""``imatrix generate``: makes only the imatrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option
from imatrix_runner.cli.options import (
    MAKE,
    CollectingOptions,
    ComputeOptions,
    SourceOptions,
    SpreadingOptions,
    TalkOptions,
    WorkDirOptions,
    dry_run_option,
    force_option,
)
from imatrix_runner.cli.requested import environment_request, imatrix_request, source_request
from imatrix_runner.cli.run_request import perform
from imatrix_runner.cli.types import FILE
from imatrix_runner.context.requests import RunRequest


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    model: str = argument()
    out: Path | None = option(
        "-o",
        "--output",
        type=FILE,
        metavar="FILE",
        section=MAKE,
        help="Where to write it (default: imatrix.gguf in the model's workspace).",
    )
    place: WorkDirOptions
    force: bool = force_option()
    dry_run: bool = dry_run_option()
    collecting: CollectingOptions
    compute: ComputeOptions
    spreading: SpreadingOptions
    source: SourceOptions
    talk: TalkOptions


@command(
    GenerateOptions,
    takes_extra=True,
    examples=("imatrix-runner imatrix generate model-BF16.gguf -f medical.txt -o medical.gguf -ngl 99",),
)
def generate(invocation: Invocation, options: GenerateOptions) -> int:
    """Compute the imatrix of MODEL on a calibration text, without quantising. The same command again continues.

    Options after -- are passed to llama-imatrix unread.
    """
    out = options.out.absolute() if options.out is not None else None
    request = RunRequest(
        source_request(options.model, options.source),
        environment_request(
            options.place.work_dir, options.compute, invocation, force=options.force, spreading=options.spreading
        ),
        imatrix_request(options.collecting, options.compute, invocation.extra, mode="generate", out=out),
        None,
    )
    return perform(request, options.talk, dry_run=options.dry_run, offline=options.source.offline)
