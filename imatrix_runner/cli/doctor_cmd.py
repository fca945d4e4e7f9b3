"""``doctor``: one page about this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from imatrix_runner.cli.options import output_options
from imatrix_runner.cli.settings import SettingsCommand, setting
from imatrix_runner.errors import ToolchainError

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


@click.command(cls=SettingsCommand)
@setting(
    "--work-dir", type=click.Path(path_type=Path, file_okay=False), default=Path("work"), help="The work directory to check."
)
@setting("--llama-cpp", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Look for llama.cpp here only.")
@click.option("--offline", is_flag=True, help="Do not ask the hub.")
@output_options
def doctor(work_dir: Path, llama_cpp: Path | None, offline: bool, as_json: bool, **_options: Any) -> int:
    """Check this machine; exit code 3 when the main job could not run."""
    import os

    from imatrix_runner.cli.documents import document, print_document
    from imatrix_runner.workflow.doctor import environment_variables, examine

    checks = examine(llama_cpp, work_dir, network=not offline)
    code = ToolchainError.exit_code if any(check.verdict == "fail" for check in checks) else 0
    variables = environment_variables(os.environ)
    if as_json:
        content = [
            {"name": check.name.strip(), "verdict": check.verdict, "detail": check.detail, "do": check.todo} for check in checks
        ]
        print_document(document("doctor", exit_code=code, checks=content, variables=variables))
        return code
    from rich.table import Table
    from rich.text import Text

    from imatrix_runner.cli.console import stdout_console

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        mark, style = _MARKS[check.verdict]
        table.add_row(Text(mark, style=style), check.name, Text(check.detail))
        if check.todo:
            table.add_row("", "", Text(f"→ {check.todo}", style=style))
    if variables:
        table.add_row(Text("✓", style="green"), "Variables", Text(", ".join(variables)))
    console = stdout_console()
    console.print(table)
    console.print(Text("The main job can run." if code == 0 else "The main job cannot run yet.", style="bold"))
    return code
