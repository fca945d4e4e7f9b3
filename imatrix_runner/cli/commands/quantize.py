"""``quantize``: makes levels of a model with an existing imatrix."""

from __future__ import annotations

from dataclasses import dataclass

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, setting
from imatrix_runner.cli.options import (
    IMATRIX,
    LevelOptions,
    MixOptions,
    QuantisingOptions,
    SourceOptions,
    SpreadingOptions,
    TalkOptions,
    ThreadOptions,
    WorkDirOptions,
    dry_run_option,
    force_option,
)
from imatrix_runner.cli.requested import environment_request, levels_request, source_request
from imatrix_runner.cli.run_request import perform
from imatrix_runner.context.requests import ImatrixRequest, RunRequest
from imatrix_runner.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class QuantizeCommandOptions:
    model: str = argument()
    wanted: LevelOptions
    place: WorkDirOptions
    force: bool = force_option()
    dry_run: bool = dry_run_option()
    imatrix: str = setting(
        "--imatrix",
        default="auto",
        show_default=True,
        metavar="auto|none|PATH",
        section=IMATRIX,
        help="auto: the one in the workspace, else none.",
    )
    compute: ThreadOptions
    making: QuantisingOptions
    mixes: MixOptions
    spreading: SpreadingOptions
    source: SourceOptions
    talk: TalkOptions


@command(
    QuantizeCommandOptions,
    examples=(
        "imatrix-runner quantize model-BF16.gguf --levels Q4_K_M,Q6_K",
        "imatrix-runner quantize model-BF16.gguf --imatrix imatrix.gguf --preset bartowski",
    ),
)
def quantize(invocation: Invocation, options: QuantizeCommandOptions) -> int:
    """Quantise MODEL with an existing imatrix; never generates one. Also spelled quantise."""
    if options.imatrix == "generate":
        raise UsageError(
            "quantize does not generate an imatrix",
            "it only uses an existing one",
            "Use: imatrix-runner run MODEL --imatrix generate",
        )
    request = RunRequest(
        source_request(options.model, options.source),
        environment_request(
            options.place.work_dir, options.compute, invocation, force=options.force, spreading=options.spreading
        ),
        ImatrixRequest(mode="there" if options.imatrix == "auto" else options.imatrix),
        levels_request(options.wanted, options.making, options.compute.threads, options.mixes),
    )
    return perform(request, options.talk, dry_run=options.dry_run, offline=options.source.offline)
