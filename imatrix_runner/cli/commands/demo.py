"""``demo``: makes and measures levels of the shipped model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.options import (
    CollectingOptions,
    ComputeOptions,
    LevelOptions,
    QuantisingOptions,
    TalkOptions,
    WorkDirOptions,
    dry_run_option,
)
from imatrix_runner.cli.requested import compute_request, environment_request, imatrix_request, levels_request
from imatrix_runner.cli.run_request import perform
from imatrix_runner.context.requests import MeasureRequest, RunRequest, SourceRequest

_LEVELS = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "IQ2_M")

_CHUNKS = 8
"""Chunks of the held-out text that the demo measures on: 2,040 scored tokens, for a standard error of 2 to 3 %."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    wanted: LevelOptions
    place: WorkDirOptions
    dry_run: bool = dry_run_option()
    collecting: CollectingOptions
    compute: ComputeOptions
    making: QuantisingOptions
    talk: TalkOptions


@command(DemoOptions, takes_extra=True)
def demo(invocation: Invocation, options: DemoOptions) -> int:
    """Quantise the shipped demo model to 8 levels, K, IQ and legacy types, and measure them. Takes about a minute."""
    from imatrix_runner.resources import DEMO_MODEL, resource

    wanted = options.wanted
    if not wanted.levels and not wanted.preset:
        wanted = replace(wanted, levels=_LEVELS)
    levels = levels_request(wanted, options.making, options.compute.threads)
    request = RunRequest(
        SourceRequest(str(resource(DEMO_MODEL))),
        environment_request(options.place.work_dir, options.compute, invocation),
        imatrix_request(options.collecting, options.compute, invocation.extra, levels=levels),
        levels,
        MeasureRequest(chunks=_CHUNKS, options=compute_request(options.compute)),
    )
    return perform(request, options.talk, dry_run=options.dry_run)
