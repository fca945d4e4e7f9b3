"""``imatrix check``: checks an imatrix against a model before anything is made with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, listed, option
from imatrix_runner.cli.options import EngineOptions, LevelOptions, QuantisingOptions, TalkOptions, WorkDirOptions
from imatrix_runner.cli.requested import environment_request, levels_request
from imatrix_runner.cli.types import FILE
from imatrix_runner.cli.work import at_work, print_result
from imatrix_runner.errors import InvalidDataError

if TYPE_CHECKING:
    from rich.console import Console

    from imatrix_runner.app.check_imatrix import CheckedMatrix

_WHAT = "What to check"
_SEVERITIES = {"error": "bold red", "warning": "yellow", "info": ""}
_VERDICTS = {"fine": "green", "weaker": "yellow", "fails": "bold red"}


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    file: Path = argument(type=FILE)
    model: Path = option("--model", required=True, type=FILE, metavar="GGUF", section=_WHAT, help="The model it is for.")
    wanted: LevelOptions = listed(_WHAT)
    place: WorkDirOptions = listed(_WHAT)
    compute: EngineOptions
    making: QuantisingOptions
    talk: TalkOptions


@command(
    CheckOptions,
    examples=("imatrix-runner imatrix check imatrix.dat --model model-BF16.gguf --preset bartowski",),
)
def check(invocation: Invocation, options: CheckOptions) -> int:
    """Compare the imatrix FILE with a model and give a verdict on every level: fine, weaker or fails.

    Exit code 6 if a level would fail, or if the imatrix cannot be used at all.
    """
    from imatrix_runner.app.check_imatrix import check as run_check

    environment = environment_request(options.place.work_dir, options.compute, invocation)
    levels = levels_request(options.wanted, options.making)
    with at_work(options.talk) as work:
        checked = run_check(options.file, options.model, levels, environment, work.context)
    code = InvalidDataError.exit_code if checked.failing or not checked.coverage.usable else 0
    print_result(options.talk, lambda: _document(checked, code), lambda console: _print(checked, console))
    return code


def _print(checked: CheckedMatrix, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"{checked.file.path}: {checked.file.describe()}"))
    for finding in checked.coverage.findings:
        if finding.kind != "origin":
            console.print(Text(f"{finding.severity.capitalize()}: {finding.text}", style=_SEVERITIES[finding.severity]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Level", "Verdict", "Why"):
        table.add_column(heading, no_wrap=heading != "Why")
    for verdict in checked.verdicts:
        table.add_row(verdict.level.name, Text(verdict.verdict, style=_VERDICTS[verdict.verdict]), Text(verdict.reason))
    console.print(table)
    recipes = [verdict.resolved.recipe for verdict in checked.verdicts]
    if any(recipe.starved or recipe.weightless or recipe.unseen for recipe in recipes):
        console.print(
            Text("Tensors without data can be kept at a safe type: --uncovered keep, or for example --uncovered q4_k")
        )


def _document(checked: CheckedMatrix, code: int) -> dict[str, Any]:
    import msgspec

    from imatrix_runner.cli.views.json_documents import document, imatrix_content

    return document(
        "imatrix-check",
        exit_code=code,
        imatrix=imatrix_content(checked.file),
        model=str(checked.model.path),
        usable=checked.coverage.usable,
        findings=[msgspec.to_builtins(finding) for finding in checked.coverage.findings],
        experts=[msgspec.to_builtins(entry) for entry in checked.coverage.experts],
        levels=[
            {
                "level": verdict.level.name,
                "verdict": verdict.verdict,
                "reason": verdict.reason,
                "failures": [failure.why for failure in verdict.resolved.recipe.failures],
                "without_weights": list(verdict.resolved.recipe.weightless),
                "unseen": list(verdict.resolved.recipe.unseen),
                "pinned": list(verdict.resolved.pinned),
            }
            for verdict in checked.verdicts
        ],
    )
