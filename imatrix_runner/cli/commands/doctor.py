"""``doctor``: checks this machine and prints the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import option, setting
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FOLDER
from imatrix_runner.errors import ToolchainError

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    work_dir: Path = setting("--work-dir", type=FOLDER, default=Path("work"), help="The work directory to check.")
    llama_cpp: Path | None = setting("--llama-cpp", type=FOLDER, metavar="DIR", help="Look for llama.cpp here only.")
    offline: bool = option("--offline", is_flag=True, help="Do not contact the hub.")
    talk: TalkOptions


@command(DoctorOptions)
def doctor(_invocation: Invocation, options: DoctorOptions) -> int:
    """Check this machine; exit code 3 if the main job cannot run."""
    import os

    from imatrix_runner.app.doctor import environment_variables, examine
    from imatrix_runner.cli.views.json_documents import document, print_document

    checks = examine(options.llama_cpp, options.work_dir, network=not options.offline)
    code = ToolchainError.exit_code if any(check.verdict == "fail" for check in checks) else 0
    variables = environment_variables(os.environ)
    if options.talk.as_json:
        content = [
            {"name": check.name.strip(), "verdict": check.verdict, "detail": check.detail, "do": check.todo} for check in checks
        ]
        print_document(document("doctor", exit_code=code, checks=content, variables=variables))
        return code
    from rich.table import Table
    from rich.text import Text

    from imatrix_runner.cli.views.console import stdout_console

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
