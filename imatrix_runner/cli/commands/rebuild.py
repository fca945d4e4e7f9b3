"""``rebuild``: makes a level's file again from its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option, setting
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FILE, FOLDER
from imatrix_runner.cli.work import at_work, print_result

if TYPE_CHECKING:
    from imatrix_runner.app.rebuild import Rebuilt


@dataclass(frozen=True, kw_only=True)
class RebuildOptions:
    recipe: Path = argument(type=FILE)
    source: Path | None = option(
        "--source", type=FILE, metavar="GGUF", help="The model that it was made from (default: next to the recipe)."
    )
    imatrix: Path | None = option(
        "--imatrix", type=FILE, metavar="FILE", help="The imatrix that it was made with (default: next to the recipe)."
    )
    out: Path = option("--out", type=FOLDER, default=Path(), metavar="FOLDER", help="Where the file goes (default: here).")
    workspace: Path | None = option(
        "--workspace", type=FOLDER, metavar="FOLDER", help="The workspace with the covariances that error feedback used."
    )
    threads: int | None = setting(
        "-t", "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads (default: all)."
    )
    talk: TalkOptions


@command(
    RebuildOptions,
    examples=("imatrix-runner rebuild model-Q4_K_M.gguf.recipe.json --source model-BF16.gguf --out again",),
)
def rebuild(invocation: Invocation, options: RebuildOptions) -> int:
    """Make the file of a level again from its RECIPE, with the same bytes, or say why they cannot be the same.

    Source and imatrix must have the hashes in the recipe. Exit code 6 if they have not, or if the bytes differ.
    """
    from imatrix_runner.app.rebuild import RebuildRequest
    from imatrix_runner.app.rebuild import rebuild as make_again
    from imatrix_runner.context.requests import EnvironmentRequest

    covariances = options.workspace / ".covariances" if options.workspace is not None else None
    request = RebuildRequest(
        options.recipe,
        options.source,
        options.imatrix,
        options.out,
        covariances,
        options.threads,
        EnvironmentRequest(command=invocation.command),
    )
    with at_work(options.talk) as work:
        result = make_again(request, work.context)
    print_result(
        options.talk, lambda: _document(result), lambda console: console.print("\n".join(str(path) for path in result.files))
    )
    return 0


def _document(result: Rebuilt) -> dict[str, Any]:
    from imatrix_runner.cli.views.json_documents import document

    return document(
        "rebuild",
        exit_code=0,
        level=result.recipe.level,
        files=[str(path) for path in result.files],
        sha256=[each.sha256 for each in result.recipe.files],
        engine=result.engine,
        made_by=result.recipe.engine,
        seconds=round(result.seconds, 3),
    )
