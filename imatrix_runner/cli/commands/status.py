"""``status``: lists every workspace and its state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import setting
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FOLDER

_STYLES = {"running": "cyan", "resumable": "yellow", "done": "green", "unreadable": "red"}


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    work_dir: Path = setting(
        "--work-dir", type=FOLDER, default=Path("work"), show_default=True, help="Where the workspaces are."
    )
    talk: TalkOptions


@command(StatusOptions)
def status(_invocation: Invocation, options: StatusOptions) -> int:
    """List every workspace: what is done, running, resumable, and the command that continues it."""
    import msgspec

    from imatrix_runner.app.status import list_workspaces
    from imatrix_runner.cli.views.json_documents import document, print_document

    work_dir = options.work_dir
    found = list_workspaces(work_dir)
    if options.talk.as_json:
        print_document(
            document("status", exit_code=0, work_dir=str(work_dir), workspaces=msgspec.to_builtins(found, enc_hook=str))
        )
        return 0
    from rich.table import Table
    from rich.text import Text

    from imatrix_runner.cli.views.console import stdout_console
    from imatrix_runner.files import human_bytes

    console = stdout_console()
    if not found:
        console.print(Text(f"No workspace in {work_dir}. Begin with: imatrix-runner run MODEL"))
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Model", "State", "Imatrix", "Levels", "Size"):
        table.add_column(heading, justify="right" if heading in ("Levels", "Size") else "left", no_wrap=True)
    for entry in found:
        levels = f"{entry.levels_done}/{entry.levels_wanted}" if entry.levels_wanted else str(entry.levels_done)
        state = Text(entry.state, style=_STYLES[entry.state])
        table.add_row(entry.model, state, entry.imatrix, levels, human_bytes(entry.n_bytes))
    console.print(table)
    for entry in found:
        for line in (entry.owner, entry.detail, f"continue with: {entry.command}" if entry.command else ""):
            if line:
                console.print(Text(f"{entry.model}: {line}"))
    return 0
