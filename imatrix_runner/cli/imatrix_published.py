"""``imatrix find`` and ``imatrix fetch``: what others computed and published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.options import output_options, together
from imatrix_runner.cli.render import listening
from imatrix_runner.cli.settings import SettingsCommand, setting

if TYPE_CHECKING:
    from imatrix_runner.workflow.find_published import Findings

hub_options = together(
    click.option(
        "--base-model", metavar="ORG/NAME", help="The model's own page on the hub (default: what the model says of itself)."
    ),
    setting("--offline", is_flag=True, help="Never touch the network: only what the hub's cache holds."),
)


@click.command(cls=SettingsCommand)
@click.argument("model")
@hub_options
@output_options
@click.pass_obj
def find(invocation: Invocation, /, model: str, **options: Any) -> int:
    """List the published imatrices of MODEL, best first; nothing is downloaded.

    MODEL is a GGUF file, a Hugging Face directory or a hub id.

    \b
    imatrix-runner imatrix find Qwen/Qwen3-0.6B
    imatrix-runner imatrix find model-BF16.gguf --base-model Qwen/Qwen3-0.6B --json
    """
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.workflow.context import Context
    from imatrix_runner.workflow.find_published import PublishedRequest
    from imatrix_runner.workflow.published import find_published

    request = PublishedRequest(model, base_model=options["base_model"], offline=options["offline"], command=invocation.command)
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        context = Context(listener.sink)
        with stop_on_signals(context.stop):
            findings = find_published(request, context)
    if options["as_json"]:
        _print_json(model, findings)
    elif not options["quiet"]:
        _print_table(model, findings)
    return 0


@click.command(cls=SettingsCommand)
@click.argument("model")
@click.option(
    "--from",
    "wanted",
    default="",
    metavar="PUBLISHER|REPO[:FILE]",
    help="Whose, or which repository's, or exactly which file (default: the first that find lists and that fits).",
)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to put it (default: imatrix.dat or imatrix.gguf in the model's workspace).",
)
@click.option("--force", is_flag=True, help="Replace a matrix that is there already.")
@setting(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("work"),
    show_default=True,
    help="Where each model gets a workspace.",
)
@hub_options
@output_options
@click.pass_obj
def fetch(invocation: Invocation, /, model: str, wanted: str, out: Path | None, **options: Any) -> int:
    """Fetch the best published imatrix of MODEL that is one and fits, and put it into the model's workspace.

    \b
    imatrix-runner imatrix fetch Qwen/Qwen3-0.6B
    imatrix-runner imatrix fetch model-BF16.gguf --from mradermacher
    imatrix-runner imatrix fetch model-BF16.gguf --from unsloth/Qwen3-0.6B-GGUF:imatrix_unsloth.dat
    """
    import msgspec

    from imatrix_runner.cli.console import stdout_console
    from imatrix_runner.cli.documents import document, print_document
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.workflow.context import Context
    from imatrix_runner.workflow.find_published import PublishedRequest
    from imatrix_runner.workflow.published import fetch_published

    request = PublishedRequest(
        model,
        options["work_dir"],
        options["base_model"],
        wanted,
        out.expanduser().absolute() if out is not None else None,
        options["force"],
        options["offline"],
        invocation.command,
    )
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        context = Context(listener.sink)
        with stop_on_signals(context.stop):
            placed = fetch_published(request, context)
    if options["as_json"]:
        source = msgspec.to_builtins(placed.source)
        print_document(
            document("imatrix-fetch", exit_code=0, path=str(placed.file.path), source=source, skipped=list(placed.skipped))
        )
    elif not options["quiet"]:
        stdout_console().print(str(placed.file.path), markup=False)
    return 0


def _print_json(model: str, findings: Findings) -> None:
    import msgspec

    from imatrix_runner.cli.documents import document, print_document

    print_document(
        document(
            "imatrix-find",
            exit_code=0,
            model=model,
            base_model=msgspec.to_builtins(findings.origin),
            candidates=[
                {"publisher": candidate.publisher, **msgspec.to_builtins(candidate)} for candidate in findings.candidates
            ],
            refused=msgspec.to_builtins(findings.refused),
            tried=list(findings.tried),
        )
    )


def _print_table(model: str, findings: Findings) -> None:
    from rich.table import Table
    from rich.text import Text

    from imatrix_runner.cli.console import stdout_console
    from imatrix_runner.files import human_bytes

    console = stdout_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Publisher", "Repository", "File", "Format", "Chunks", "Size", "Date", "Commit"):
        table.add_column(heading, justify="right" if heading in ("Chunks", "Size") else "left", overflow="fold")
    for candidate in findings.candidates:
        cells = (
            candidate.publisher,
            candidate.repo,
            candidate.file,
            candidate.format if candidate.checked else f"{candidate.format}?",
            str(candidate.chunks) if candidate.chunks is not None else "-",
            human_bytes(candidate.size) if candidate.size is not None else "unknown",
            (candidate.date or "-")[:10],
            candidate.commit[:12],
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    for refused in findings.refused:
        console.print(Text(f"Refused {refused}", style="yellow"))
    if not all(candidate.checked for candidate in findings.candidates):
        console.print(Text("A format with ? is told by the name only; fetch looks inside."))
    console.print(Text(f"Fetch the first that fits with: imatrix-runner imatrix fetch {model}"))
