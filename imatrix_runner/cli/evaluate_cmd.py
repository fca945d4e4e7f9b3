"""``evaluate``: what each level costs, measured against its source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.measure_options import measure_options, measure_request, unused_measure_options
from imatrix_runner.cli.options import (
    compute_options,
    compute_request,
    environment_options,
    environment_request,
    output_options,
    source_options,
    source_request,
    threads_option,
)
from imatrix_runner.cli.render import listening
from imatrix_runner.cli.settings import SettingsCommand, setting
from imatrix_runner.cli.types import LevelNames
from imatrix_runner.errors import SomeLevelsFailedError, UsageError
from imatrix_runner.workflow.request import EvaluateRequest, LevelsRequest


@click.command(cls=SettingsCommand)
@click.argument("model")
@setting("--levels", type=LevelNames(), default="", help="Levels to measure (default: all that are there).")
@measure_options
@setting("--chunks", type=click.IntRange(min=1), metavar="N", help="Measure on the first N chunks (default: all).")
@setting(
    "--kl-divergence-base",
    "base",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Compare with these log-probabilities, as llama-perplexity wrote them, and not with the source's on a text.",
)
@click.option("--again", is_flag=True, help="Measure also what was measured before.")
@compute_options
@threads_option
@source_options
@environment_options
@click.option("--dry-run", is_flag=True, help="Plan only: what will be measured, on what, with how much disk. Writes nothing.")
@output_options
@click.pass_obj
def evaluate(invocation: Invocation, /, model: str, **options: Any) -> int:
    """Measure the levels of MODEL against MODEL itself.

    MODEL is what the levels were made from, named as for run. Each level's predictions are compared with the source's, token by
    token: perplexity, KL divergence, and how often both put the same token first. Interrupted, the same command continues.

    \b
    imatrix-runner evaluate model-BF16.gguf
    imatrix-runner evaluate model-BF16.gguf --levels Q4_K_M,IQ3_XXS --ab
    imatrix-runner evaluate model-BF16.gguf --domain prompts.jsonl
    """
    if options["base"] is not None and options["held_out"] is not None:
        raise UsageError(
            "--text and --kl-divergence-base exclude each other",
            "the file of log-probabilities holds its own text",
            "Leave one out.",
        )
    measure = measure_request(
        options,
        levels=options["levels"],
        chunks=options["chunks"],
        base=options["base"],
        again=options["again"],
        options=compute_request(options),
    )
    request = EvaluateRequest(
        source_request(model, options),
        environment_request(options, invocation),
        measure,
        LevelsRequest(threads=options["threads"]),
        unused_measure_options(options, measured=True),
    )
    return _perform(request, options)


def _perform(request: EvaluateRequest, options: dict[str, Any]) -> int:
    from imatrix_runner.cli.console import stderr_console, stdout_console
    from imatrix_runner.cli.documents import print_document
    from imatrix_runner.cli.evaluate_tables import evaluate_document, print_failed, print_measure_plan, print_reported
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.workflow.context import Context
    from imatrix_runner.workflow.evaluate import MeasurePlan, evaluate

    dry_run = options["dry_run"]
    if options.get("offline"):
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        context = Context(listener.sink)

        def show(plan: MeasurePlan) -> None:
            if not dry_run:
                print_measure_plan(plan, listener.console)

        with stop_on_signals(context.stop):
            result = evaluate(request, context, dry_run=dry_run, on_plan=show)
    code = SomeLevelsFailedError.exit_code if result.failed else 0
    if options["as_json"]:
        print_document(evaluate_document(result, code))
    elif dry_run:
        print_measure_plan(result.plan, stdout_console())
    elif options["quiet"]:
        print_failed(result, stderr_console())
    else:
        print_reported(result.report, stdout_console())
        print_failed(result, stdout_console())
    return code
