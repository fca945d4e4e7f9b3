"""``evaluate``: measures each level against its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, listed, option, setting, typed
from imatrix_runner.cli.options import (
    MEASURE,
    ComputeOptions,
    MeasuringOptions,
    SourceOptions,
    SpreadingOptions,
    TalkOptions,
    WorkDirOptions,
)
from imatrix_runner.cli.requested import (
    compute_request,
    environment_request,
    measure_request,
    source_request,
    unused_measure_options,
)
from imatrix_runner.cli.types import FILE, LevelNames, Names, Share
from imatrix_runner.cli.work import at_work, stay_offline
from imatrix_runner.context.requests import EvaluateRequest, LevelsRequest
from imatrix_runner.errors import SomeLevelsFailedError, UsageError
from imatrix_runner.events import no_effect

_WHAT = "What to measure"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    model: str = argument()
    levels: tuple[str, ...] = setting(
        "--levels", type=LevelNames(), default="", section=_WHAT, help="Levels to measure (default: all that are there)."
    )
    place: WorkDirOptions = listed(_WHAT)
    again: bool = option("--again", is_flag=True, section=_WHAT, help="Also measure what was measured before.")
    dry_run: bool = option(
        "--dry-run",
        is_flag=True,
        section=_WHAT,
        help="Plan only: what will be measured, on which text, and the disk space. Writes nothing.",
    )
    measuring: MeasuringOptions
    ctx_size: int = setting(
        "-c",
        "--ctx-size",
        type=click.IntRange(min=16),
        metavar="N",
        default=512,
        show_default=True,
        section=MEASURE,
        help="Tokens per chunk.",
    )
    chunks: int | None = setting(
        "--chunks",
        type=click.IntRange(min=1),
        metavar="N",
        section=MEASURE,
        help="Measure on the first N chunks (default: all).",
    )
    until_precise: float | None = setting(
        "--until-precise",
        type=Share(),
        section=MEASURE,
        help="Measure each level, on chunks from all over the text, until the standard error of its KLD is below this share.",
    )
    base: Path | None = setting(
        "--kl-divergence-base",
        type=FILE,
        metavar="FILE",
        section=MEASURE,
        help="Compare with these log-probabilities, as written by llama-perplexity, instead of the source's on a text.",
    )
    tasks: tuple[str, ...] = setting(
        "--tasks",
        type=Names(),
        default="",
        metavar="NAME|FILE[,…]",
        section=MEASURE,
        help="Also score source and levels on tasks of lm-evaluation-harness, YAML files, or the shipped set mini.",
    )
    limit: int | None = setting(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        section=MEASURE,
        help="Only the first N items of each task (default: all).",
    )
    allow_code: bool = option(
        "--allow-code-execution",
        is_flag=True,
        section=MEASURE,
        help="Let tasks run programs that the models write, in a sandbox without network and files.",
    )
    compute: ComputeOptions
    spreading: SpreadingOptions
    source: SourceOptions
    talk: TalkOptions


@command(
    EvaluateOptions,
    examples=(
        "imatrix-runner evaluate model-BF16.gguf",
        "imatrix-runner evaluate model-BF16.gguf --levels Q4_K_M,IQ3_XXS --ab",
        "imatrix-runner evaluate model-BF16.gguf --until-precise 2%",
        "imatrix-runner evaluate model-BF16.gguf --domain prompts.jsonl",
        "imatrix-runner evaluate model-BF16.gguf --tasks mini",
    ),
)
def evaluate(invocation: Invocation, options: EvaluateOptions) -> int:
    """Measure the levels of MODEL against MODEL itself.

    MODEL is what the levels were made from, named as for run. Each level's predictions are compared with the source's, token by
    token: perplexity, KL divergence, and how often both rank the same token first. After an interruption, the same command
    continues.
    """
    if options.base is not None and options.until_precise is not None:
        raise UsageError(
            "--until-precise and --kl-divergence-base exclude each other",
            "a file of log-probabilities has its chunks in the order of its text, whose beginning is no sample of all of it",
            "Leave one out.",
        )
    if options.base is not None and options.measuring.held_out is not None:
        raise UsageError(
            "--text and --kl-divergence-base exclude each other",
            "the file of log-probabilities contains its own text",
            "Leave one out.",
        )
    measure = measure_request(
        options.measuring,
        compute_request(options.compute, options.ctx_size),
        levels=options.levels,
        chunks=options.chunks,
        until_precise=options.until_precise,
        base=options.base,
        again=options.again,
        tasks=options.tasks,
        task_limit=options.limit,
        allow_code=options.allow_code,
    )
    request = EvaluateRequest(
        source_request(options.model, options.source),
        environment_request(options.place.work_dir, options.compute, invocation, spreading=options.spreading),
        measure,
        LevelsRequest(threads=options.compute.threads),
        _unused(options),
    )
    return _perform(request, options)


def _unused(options: EvaluateOptions) -> tuple[str, ...]:
    unused = unused_measure_options(options.measuring, measured=True)
    if not options.tasks and (given := typed(options, "limit", "allow_code")):
        unused = (*unused, no_effect(given, "nothing is scored without --tasks."))
    if options.base is not None and (contexts := typed(options, "ctx_size")):
        return (no_effect(contexts, "the file of log-probabilities was written with chunks of its own length."), *unused)
    return unused


def _perform(request: EvaluateRequest, options: EvaluateOptions) -> int:
    from imatrix_runner.app.evaluate import MeasurePlan
    from imatrix_runner.app.evaluate import evaluate as run_evaluate
    from imatrix_runner.cli.views.console import stderr_console, stdout_console
    from imatrix_runner.cli.views.json_documents import print_document
    from imatrix_runner.cli.views.report_table import evaluate_document, print_failed, print_measure_plan, print_reported

    dry_run = options.dry_run
    stay_offline(options.source.offline)
    with at_work(options.talk) as work:

        def show(plan: MeasurePlan) -> None:
            if not dry_run:
                print_measure_plan(plan, work.console)

        result = run_evaluate(request, work.context, dry_run=dry_run, on_plan=show)
    code = SomeLevelsFailedError.exit_code if result.failed else 0
    if options.talk.as_json:
        print_document(evaluate_document(result, code))
    elif dry_run:
        print_measure_plan(result.plan, stdout_console())
    elif options.talk.quiet:
        print_failed(result, stderr_console())
    else:
        print_reported(result.report, stdout_console())
        print_failed(result, stdout_console())
    return code
