"""``run``: makes the levels of a model with an imatrix, and measures them if requested."""

from __future__ import annotations

from dataclasses import dataclass

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, setting
from imatrix_runner.cli.options import (
    IMATRIX,
    MEASURE,
    CollectingOptions,
    ComputeOptions,
    LevelOptions,
    MeasuringOptions,
    MixOptions,
    QuantisingOptions,
    SourceOptions,
    SpreadingOptions,
    TalkOptions,
    WorkDirOptions,
    dry_run_option,
    force_option,
)
from imatrix_runner.cli.publishing_options import PUBLISH, PublishingOptions
from imatrix_runner.cli.requested import (
    compute_request,
    environment_request,
    imatrix_request,
    levels_request,
    measure_request,
    publish_request,
    source_request,
    unused_measure_options,
    unused_publish_options,
)
from imatrix_runner.cli.run_request import perform
from imatrix_runner.context.requests import MeasureRequest, RunRequest


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    model: str = argument()
    wanted: LevelOptions
    place: WorkDirOptions
    force: bool = force_option()
    dry_run: bool = dry_run_option()
    imatrix: str = setting(
        "--imatrix",
        default="auto",
        show_default=True,
        metavar="auto|published|generate|none|PATH",
        section=IMATRIX,
        help="auto: the one in the workspace, else for a hub id a published one, else generate.",
    )
    collecting: CollectingOptions
    compute: ComputeOptions
    making: QuantisingOptions
    mixes: MixOptions
    evaluate: bool = setting(
        "--evaluate",
        is_flag=True,
        section=MEASURE,
        help="Then measure every level against the source (see imatrix-runner evaluate --help).",
    )
    measuring: MeasuringOptions
    attest: bool = setting(
        "--attest",
        is_flag=True,
        section=PUBLISH,
        help="Leave an attestation next to each level, as ggufpacker verifies it; publish uploads them.",
    )
    publish: str = setting(
        "--publish",
        default="",
        metavar="ORG/NAME",
        section=PUBLISH,
        help="Upload each level to this hub repository while the next is made (see imatrix-runner publish --help).",
    )
    publishing: PublishingOptions
    spreading: SpreadingOptions
    source: SourceOptions
    talk: TalkOptions


@command(
    RunOptions,
    takes_extra=True,
    examples=(
        "imatrix-runner run model-BF16.gguf",
        "imatrix-runner run org/name --preset bartowski -ngl 99",
        "imatrix-runner run model-BF16.gguf --levels Q4_K_M,IQ3_XXS --dry-run",
        "imatrix-runner run model-BF16.gguf --preset bartowski --target-size 4GiB",
    ),
)
def run(invocation: Invocation, options: RunOptions) -> int:
    """Take MODEL through imatrix and quantisation to verified files.

    MODEL is a GGUF file (any shard of a split one), a Hugging Face directory, or a hub id: org/name[@revision][:file.gguf].
    Options after -- are passed to llama-imatrix unread. The same command again continues, or does nothing.
    """
    request = run_request(invocation, options)
    return perform(request, options.talk, dry_run=options.dry_run, offline=options.source.offline)


def run_request(invocation: Invocation, options: RunOptions) -> RunRequest:
    """The request that the options make."""
    measure = _measure(options)
    levels = levels_request(options.wanted, options.making, options.compute.threads, options.mixes)
    environment = environment_request(
        options.place.work_dir, options.compute, invocation, force=options.force, spreading=options.spreading
    )
    return RunRequest(
        source_request(options.model, options.source),
        environment,
        imatrix_request(options.collecting, options.compute, invocation.extra, mode=options.imatrix, levels=levels),
        levels,
        measure,
        (
            *unused_measure_options(options.measuring, measured=measure is not None),
            *unused_publish_options(options.publishing, published=bool(options.publish)),
        ),
        publish_request(options.model, options.publish, environment, options.publishing) if options.publish else None,
        attest=options.attest,
    )


def _measure(options: RunOptions) -> MeasureRequest | None:
    """The measurement at the end; None without ``--evaluate`` or an option that implies it. -c and --chunks do not apply."""
    wanted = options.measuring
    implied = (
        wanted.held_out,
        wanted.ab,
        wanted.domain,
        wanted.target_kld,
        wanted.target_size,
        wanted.speed or wanted.min_speed,
    )
    if not options.evaluate and not any(implied):
        return None
    return measure_request(wanted, compute_request(options.compute))
