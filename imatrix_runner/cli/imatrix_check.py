"""``imatrix check``: the preflight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.options import environment_options, environment_request, level_options, levels_request, output_options
from imatrix_runner.cli.settings import SettingsCommand
from imatrix_runner.errors import InvalidDataError

if TYPE_CHECKING:
    from imatrix_runner.workflow.check import Checked

_SEVERITIES = {"error": "bold red", "warning": "yellow", "info": ""}
_VERDICTS = {"fine": "green", "weaker": "yellow", "fails": "bold red"}


@click.command(cls=SettingsCommand)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="GGUF",
    help="The model it is for.",
)
@level_options
@environment_options
@output_options
@click.pass_obj
def check(invocation: Invocation, /, file: Path, model: Path, **options: Any) -> int:
    """Compare the imatrix FILE with a model and tell what every level would become: fine, weaker or failing.

    Exit code 6 when a level would fail, or when the matrix cannot be used at all.

    \b
    imatrix-runner imatrix check imatrix.dat --model model-BF16.gguf --preset bartowski
    """
    from imatrix_runner.cli.documents import print_document
    from imatrix_runner.cli.render import listening
    from imatrix_runner.workflow.check import check as run_check
    from imatrix_runner.workflow.context import Context

    options["threads"] = None
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        environment = environment_request(options, invocation)
        checked = run_check(file, model, levels_request(options), environment, Context(listener.sink))
    code = InvalidDataError.exit_code if checked.failing or not checked.coverage.usable else 0
    if options["as_json"]:
        print_document(_document(checked, code))
    elif not options["quiet"]:
        _print(checked)
    return code


def _print(checked: Checked) -> None:
    from rich.table import Table
    from rich.text import Text

    from imatrix_runner.cli.console import stdout_console

    console = stdout_console()
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


def _document(checked: Checked, code: int) -> dict[str, Any]:
    import msgspec

    from imatrix_runner.cli.documents import document, imatrix_content

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
