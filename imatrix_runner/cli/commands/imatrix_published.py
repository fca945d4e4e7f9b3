"""``imatrix find`` and ``imatrix fetch``: published imatrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import OPTIONS, argument, listed, option, setting
from imatrix_runner.cli.options import TalkOptions, WorkDirOptions
from imatrix_runner.cli.types import FILE
from imatrix_runner.cli.work import at_work, print_result

if TYPE_CHECKING:
    from rich.console import Console

    from imatrix_runner.imatrix.published.fetch_matrix import Placed
    from imatrix_runner.imatrix.published.find_matrix import Findings


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """The model's page on the hub, and whether the network may be used."""

    base_model: str | None = option(
        "--base-model", metavar="ORG/NAME", help="The model's own page on the hub (default: as the model's metadata says)."
    )
    offline: bool = setting("--offline", is_flag=True, help="Never use the network: only the hub's cache.")


@dataclass(frozen=True, kw_only=True)
class FindOptions:
    model: str = argument()
    hub: HubOptions
    talk: TalkOptions


@command(
    FindOptions,
    examples=(
        "imatrix-runner imatrix find Qwen/Qwen3-0.6B",
        "imatrix-runner imatrix find model-BF16.gguf --base-model Qwen/Qwen3-0.6B --json",
    ),
)
def find(invocation: Invocation, options: FindOptions) -> int:
    """List the published imatrices of MODEL, best first; nothing is downloaded.

    MODEL is a GGUF file, a Hugging Face directory or a hub id.
    """
    from imatrix_runner.imatrix.published.fetch_matrix import find_published
    from imatrix_runner.imatrix.published.find_matrix import PublishedRequest

    model, hub = options.model, options.hub
    request = PublishedRequest(model, base_model=hub.base_model, offline=hub.offline, command=invocation.command)
    with at_work(options.talk) as work:
        findings = find_published(request, work.context)
    print_result(options.talk, lambda: _found(model, findings), lambda console: _print_table(model, findings, console))
    return 0


@dataclass(frozen=True, kw_only=True)
class FetchMatrixOptions:
    model: str = argument()
    wanted: str = option(
        "--from",
        default="",
        metavar="PUBLISHER|REPO[:FILE]",
        help="Publisher, repository or file to take it from (default: the first that find lists and that fits).",
    )
    out: Path | None = option(
        "-o",
        "--output",
        type=FILE,
        metavar="FILE",
        help="Where to put it (default: imatrix.dat or imatrix.gguf in the model's workspace).",
    )
    force: bool = option("--force", is_flag=True, help="Replace an existing imatrix.")
    place: WorkDirOptions = listed(OPTIONS)
    hub: HubOptions
    talk: TalkOptions


@command(
    FetchMatrixOptions,
    examples=(
        "imatrix-runner imatrix fetch Qwen/Qwen3-0.6B",
        "imatrix-runner imatrix fetch model-BF16.gguf --from mradermacher",
        "imatrix-runner imatrix fetch model-BF16.gguf --from unsloth/Qwen3-0.6B-GGUF:imatrix_unsloth.dat",
    ),
)
def fetch(invocation: Invocation, options: FetchMatrixOptions) -> int:
    """Fetch the best published imatrix of MODEL that is valid and fits, and put it into the model's workspace."""
    from imatrix_runner.imatrix.published.fetch_matrix import fetch_published
    from imatrix_runner.imatrix.published.find_matrix import PublishedRequest

    request = PublishedRequest(
        options.model,
        options.place.work_dir,
        options.hub.base_model,
        options.wanted,
        options.out.expanduser().absolute() if options.out is not None else None,
        options.force,
        options.hub.offline,
        invocation.command,
    )
    with at_work(options.talk) as work:
        placed = fetch_published(request, work.context)
    print_result(
        options.talk,
        lambda: _fetched(placed),
        lambda console: console.print(str(placed.file.path), markup=False),
    )
    return 0


def _fetched(placed: Placed) -> dict[str, Any]:
    import msgspec

    from imatrix_runner.cli.views.json_documents import document

    source = msgspec.to_builtins(placed.source)
    return document("imatrix-fetch", exit_code=0, path=str(placed.file.path), source=source, skipped=list(placed.skipped))


def _found(model: str, findings: Findings) -> dict[str, Any]:
    import msgspec

    from imatrix_runner.cli.views.json_documents import document

    return document(
        "imatrix-find",
        exit_code=0,
        model=model,
        base_model=msgspec.to_builtins(findings.origin),
        candidates=[{"publisher": candidate.publisher, **msgspec.to_builtins(candidate)} for candidate in findings.candidates],
        refused=msgspec.to_builtins(findings.refused),
        tried=list(findings.tried),
    )


def _print_table(model: str, findings: Findings, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from imatrix_runner.files import human_bytes

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
        console.print(Text("A format with ? is guessed from the name; fetch checks the content."))
    console.print(Text(f"Fetch the first that fits with: imatrix-runner imatrix fetch {model}"))
