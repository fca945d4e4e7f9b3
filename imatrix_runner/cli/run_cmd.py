"""``run``, ``quantize`` and ``demo``: one model, one imatrix, many levels."""

from __future__ import annotations

import os
from typing import Any

import click

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.measure_options import measure_options, measure_request, unused_measure_options
from imatrix_runner.cli.options import (
    collect_options,
    compute_request,
    dry_run_option,
    environment_options,
    environment_request,
    force_option,
    imatrix_request,
    level_options,
    levels_request,
    output_options,
    source_options,
    source_request,
    threads_option,
)
from imatrix_runner.cli.render import listening
from imatrix_runner.cli.settings import SettingsCommand, setting
from imatrix_runner.engines.base import CollectOptions
from imatrix_runner.errors import SomeLevelsFailedError, UsageError
from imatrix_runner.workflow.request import ImatrixRequest, MeasureRequest, RunRequest


@click.command(cls=SettingsCommand, takes_extra=True)
@click.argument("model")
@setting(
    "--imatrix",
    default="auto",
    show_default=True,
    metavar="auto|published|generate|none|PATH",
    help="auto: what lies in the workspace, else for a hub's model a published one, else generate.",
)
@level_options
@collect_options
@threads_option
@setting("--evaluate", is_flag=True, help="Then measure every level against the source (see imatrix-runner evaluate --help).")
@measure_options
@source_options
@environment_options
@force_option
@dry_run_option
@output_options
@click.pass_obj
def run(invocation: Invocation, /, model: str, imatrix: str, **options: Any) -> int:
    """Take MODEL through imatrix and quantisation to verified files.

    MODEL is a GGUF file (any shard of a split one), a Hugging Face directory, or a hub id: org/name[@revision][:file.gguf].
    Options after -- go to llama-imatrix unread. The same command again continues or does nothing.

    \b
    imatrix-runner run model-BF16.gguf
    imatrix-runner run org/name --preset bartowski -ngl 99
    imatrix-runner run model-BF16.gguf --levels Q4_K_M,IQ3_XXS --dry-run
    imatrix-runner run model-BF16.gguf --preset bartowski --target-size 4GiB
    """
    measure = _measure(options)
    request = RunRequest(
        source_request(model, options),
        environment_request(options, invocation),
        imatrix_request(options, invocation.extra, mode=imatrix),
        levels_request(options),
        measure,
        unused_measure_options(options, measured=measure is not None),
    )
    return perform(request, options)


_DEMO_CHUNKS = 8
"""Of the held-out text, to measure the demo model's levels with: 2,040 scored tokens, for a standard error of 2 to 3 %."""


def _measure(options: dict[str, Any]) -> MeasureRequest | None:
    """What is measured at the end; None without ``--evaluate`` and whatever implies it. -c and --chunks are the imatrix's."""
    implied = ("held_out", "ab", "domain", "target_kld", "target_size")
    if not options["evaluate"] and not any(options[name] for name in implied):
        return None
    return measure_request(options, options=compute_request({**options, "ctx_size": CollectOptions.n_ctx}))


@click.command(cls=SettingsCommand)
@click.argument("model")
@setting(
    "--imatrix",
    default="auto",
    show_default=True,
    metavar="auto|none|PATH",
    help="auto: what lies in the workspace, else none.",
)
@level_options
@threads_option
@source_options
@environment_options
@force_option
@dry_run_option
@output_options
@click.pass_obj
def quantize(invocation: Invocation, /, model: str, imatrix: str, **options: Any) -> int:
    """Quantise MODEL with the imatrix that is there; never generates one. Also spelled quantise."""
    if imatrix == "generate":
        raise UsageError(
            "quantize does not generate an imatrix",
            "it only uses what is there",
            "Use: imatrix-runner run MODEL --imatrix generate",
        )
    request = RunRequest(
        source_request(model, options),
        environment_request(options, invocation),
        ImatrixRequest(mode="there" if imatrix == "auto" else imatrix),
        levels_request(options),
    )
    return perform(request, options)


@click.command(cls=SettingsCommand, takes_extra=True)
@level_options
@collect_options
@threads_option
@environment_options
@dry_run_option
@output_options
@click.pass_obj
def demo(invocation: Invocation, /, **options: Any) -> int:
    """Quantise the shipped demo model to 8 levels, K, IQ and legacy types, and measure them. Takes about a minute."""
    from imatrix_runner.resources import DEMO_MODEL, resource

    if not options["levels"] and not options["preset"]:
        options["levels"] = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "IQ2_M")
    source = {"outtype": "auto", "mmproj": False, "trust_remote_code": False}
    request = RunRequest(
        source_request(str(resource(DEMO_MODEL)), source),
        environment_request(options, invocation),
        imatrix_request(options, invocation.extra),
        levels_request(options),
        MeasureRequest(chunks=_DEMO_CHUNKS, options=compute_request({**options, "ctx_size": CollectOptions.n_ctx})),
    )
    return perform(request, options)


def perform(request: RunRequest, options: dict[str, Any]) -> int:
    """Run a request and show plan and result; the exit code is 0, or 100 when levels failed."""
    from imatrix_runner.cli.console import stderr_console, stdout_console
    from imatrix_runner.cli.documents import print_document, run_document
    from imatrix_runner.cli.tables import print_failures, print_plan, print_result
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.workflow.context import Context
    from imatrix_runner.workflow.plan import Plan
    from imatrix_runner.workflow.run import run as run_workflow

    dry_run, as_json = options["dry_run"], options["as_json"]
    if options.get("offline"):
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        context = Context(listener.sink)

        def show(plan: Plan) -> None:
            if not dry_run:
                print_plan(plan, listener.console)

        with stop_on_signals(context.stop):
            result = run_workflow(request, context, dry_run=dry_run, on_plan=show)
    unmeasured = result.evaluated.failed if result.evaluated is not None else {}
    failed = bool(result.plan.failing if dry_run else result.failed) or bool(unmeasured)
    code = SomeLevelsFailedError.exit_code if failed else 0
    out = stdout_console()
    if as_json:
        print_document(run_document(result, code))
    elif dry_run:
        print_plan(result.plan, out)
    elif options["quiet"]:
        print_failures(result, stderr_console())
    else:
        print_result(result, out)
    return code
