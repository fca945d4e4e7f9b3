"""``compare``: measures GGUF files that were made elsewhere, and says which to take at which size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, listed, option, setting, typed
from imatrix_runner.cli.options import MEASURE, ComputeOptions, SourceOptions, TalkOptions, WorkDirOptions
from imatrix_runner.cli.requested import compute_request, environment_request, source_request
from imatrix_runner.cli.types import FILE, SIZE, TEXT
from imatrix_runner.cli.work import at_work, print_result, stay_offline
from imatrix_runner.context.requests import CompareRequest, MeasureRequest
from imatrix_runner.errors import SomeLevelsFailedError, UsageError
from imatrix_runner.events import no_effect, warning

_WHAT = "What to compare"


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    model: str = argument()
    files: tuple[str, ...] = argument(nargs=-1, metavar="FILE|REPO[:FILE]...")
    clone: str = option(
        "--clone",
        default="",
        metavar="FILE|REPO:FILE",
        section=_WHAT,
        help="Instead of comparing, print the type of each tensor of this file, for quantize --tensor-type-file.",
    )
    out: Path | None = option(
        "-o", "--output", type=FILE, metavar="FILE", section=_WHAT, help="Write what --clone prints to a file."
    )
    place: WorkDirOptions = listed(_WHAT)
    again: bool = option("--again", is_flag=True, section=_WHAT, help="Also measure what was measured before.")
    dry_run: bool = option(
        "--dry-run",
        is_flag=True,
        section=_WHAT,
        help="Show only what the headers say and whether the files are of this model. Fetches nothing else.",
    )
    keep: bool = option(
        "--keep", is_flag=True, section=_WHAT, help="Keep fetched files in the hub's cache (default: remove them again)."
    )
    held_out: Path | None = setting(
        "--text",
        type=TEXT,
        metavar="HELD_OUT",
        section=MEASURE,
        help="Held-out text to measure on, which must not overlap the calibration text (default: a shipped one).",
    )
    max_disk: int | None = setting(
        "--max-disk",
        type=SIZE,
        section=MEASURE,
        help="Most disk space for the measurement and the files fetched for it at a time (default: 8GiB).",
    )
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
    compute: ComputeOptions
    source: SourceOptions
    talk: TalkOptions


@command(
    CompareOptions,
    examples=(
        "imatrix-runner compare model-BF16.gguf downloaded-Q4_K_M.gguf",
        "imatrix-runner compare model-BF16.gguf someone/model-GGUF:Q4_K_M other/model-GGUF:model-IQ4_XS.gguf",
        "imatrix-runner compare model-BF16.gguf --clone someone/model-GGUF:model-Q4_K_XL.gguf -o types.txt",
    ),
)
def compare(invocation: Invocation, options: CompareOptions) -> int:
    """Compare GGUF files made from MODEL by others with its levels here, and with each other.

    MODEL is named as for run. Each FILE is a path, or a file of a hub: REPO:FILE.gguf, REPO:LABEL (Q4_K_M), or REPO for all
    its levels. Headers are read first; a file that was not made from MODEL is refused. All are measured on the same chunks as
    the levels in the workspace, and compared at equal size. After an interruption, the same command continues.
    """
    if bool(options.files) == bool(options.clone):
        raise UsageError(
            "There is nothing to compare" if not options.clone else "--clone takes no further files",
            "no file was named" if not options.clone else "it prints the recipe of one file, and measures nothing",
            "Name files: imatrix-runner compare MODEL FILE…; or one to copy the types of: compare MODEL --clone FILE",
        )
    measure = MeasureRequest(
        text=options.held_out,
        options=compute_request(options.compute, options.ctx_size),
        chunks=options.chunks,
        max_disk=options.max_disk,
        again=options.again,
    )
    request = CompareRequest(
        source_request(options.model, options.source),
        environment_request(options.place.work_dir, options.compute, invocation),
        measure,
        options.files or (options.clone,),
        keep=options.keep,
    )
    stay_offline(options.source.offline)
    return _clone(request, options) if options.clone else _perform(request, options)


def _clone(request: CompareRequest, options: CompareOptions) -> int:
    from imatrix_runner.app.compare import clone_file
    from imatrix_runner.cli.views.compare_tables import clone_document, print_clone
    from imatrix_runner.files import atomic_writer

    with at_work(options.talk) as work:
        if unused := typed(options, "again", "dry_run", "keep", "held_out", "max_disk", "ctx_size", "chunks"):
            work.context.sink(warning(no_effect(unused, "--clone measures nothing.")))
        recipe = clone_file(request, work.context)
    if options.out is not None:
        with atomic_writer(options.out) as file:
            file.write(recipe.as_tensor_types.encode())
    print_result(
        options.talk,
        lambda: clone_document(recipe, options.out),
        lambda console: print_clone(recipe, options.model, options.out, console),
    )
    return 0


def _perform(request: CompareRequest, options: CompareOptions) -> int:
    from imatrix_runner.app.compare import ComparePlan, compare_files
    from imatrix_runner.cli.views.compare_tables import compare_document, print_compared, print_plan
    from imatrix_runner.cli.views.console import stderr_console, stdout_console
    from imatrix_runner.cli.views.json_documents import print_document

    with at_work(options.talk) as work:
        if options.out is not None:
            work.context.sink(warning(no_effect(("--output",), "only --clone writes a file.")))

        def show(plan: ComparePlan) -> None:
            if not options.dry_run:
                print_plan(plan, work.console)

        result = compare_files(request, work.context, dry_run=options.dry_run, on_plan=show)
    code = SomeLevelsFailedError.exit_code if result.failed else 0
    if options.talk.as_json:
        print_document(compare_document(result, code))
    elif options.dry_run:
        print_plan(result.plan, stdout_console())
    if not options.talk.as_json:
        print_compared(result, stderr_console() if options.talk.quiet else stdout_console(), quiet=options.talk.quiet)
    return code
