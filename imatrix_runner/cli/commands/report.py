"""``report``: makes a workspace's page, model card, picture and JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, setting
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FOLDER
from imatrix_runner.cli.work import at_work
from imatrix_runner.errors import UsageError
from imatrix_runner.models.origin import repository_in


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    workspace: str = argument()
    work_dir: Path = setting(
        "--work-dir", type=FOLDER, default=Path("work"), show_default=True, help="Where the workspaces are."
    )
    quantized_by: str = setting(
        "--quantized-by", default="", metavar="NAME", help="Maker of the files, as the model card names them."
    )
    repo: str = setting("--repo", default="", metavar="ORG/NAME", help="Hub repository in the card's download commands.")
    talk: TalkOptions


@command(
    ReportOptions,
    examples=(
        "imatrix-runner report work/model",
        "imatrix-runner report model --quantized-by me --repo me/model-GGUF",
    ),
)
def report(invocation: Invocation, options: ReportOptions) -> int:
    """Make report.html, report.md, report.png and report.json of WORKSPACE from recorded facts; nothing is measured again.

    WORKSPACE is a path such as work/model, or the model's name in --work-dir. Reports that imatrix-runner made are replaced if
    something changed; a file that you edited is never overwritten.
    """
    from imatrix_runner.app.report import make_report
    from imatrix_runner.cli.views.console import stdout_console
    from imatrix_runner.cli.views.report_table import print_report
    from imatrix_runner.context.context import held
    from imatrix_runner.context.named_workspace import named_workspace
    from imatrix_runner.context.requests import EnvironmentRequest
    from imatrix_runner.journal import Journal
    from imatrix_runner.report.document import encode_report

    name, repo = options.quantized_by, options.repo
    if repo and repository_in(repo) is None:
        raise UsageError(f"{repo!r} is not a hub id", "a repository is named ORG/NAME", "For example: --repo me/model-GGUF")
    found = named_workspace(options.workspace, options.work_dir)
    environment = EnvironmentRequest(command=invocation.command)
    with at_work(options.talk) as work, held(found, environment, work.context, dry_run=False) as runner:
        made = make_report(found, Journal(found.journal), runner, work.context.sink, quantized_by=name, repo=repo)
    if options.talk.as_json:
        sys.stdout.write(encode_report(made.report).decode())
        sys.stdout.flush()
    elif not options.talk.quiet:
        console = stdout_console()
        print_report(made.report, console)
        console.print("\n".join(str(path) for path in made.paths))
    return 0
