"""``report``: a workspace's page, model card, picture and JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.options import output_options
from imatrix_runner.cli.render import listening
from imatrix_runner.cli.settings import SettingsCommand, setting
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.models.origin import repository_in
from imatrix_runner.workspace import Workspace


@click.command(cls=SettingsCommand)
@click.argument("workspace")
@setting(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("work"),
    show_default=True,
    help="Where the workspaces are.",
)
@setting("--quantized-by", default="", metavar="NAME", help="Whom the model card names as the maker of the files.")
@setting("--repo", default="", metavar="ORG/NAME", help="The hub repository that the card's download commands name.")
@output_options
@click.pass_obj
def report(
    invocation: Invocation, /, workspace: str, work_dir: Path, quantized_by: str, repo: str, as_json: bool, **options: Any
) -> int:
    """Make report.html, report.md, report.png and report.json of WORKSPACE, from what is known; nothing is computed again.

    WORKSPACE is a path such as work/model, or just the model's name in --work-dir. Files of ours are replaced when something
    changed; one that you edited is never overwritten.

    \b
    imatrix-runner report work/model
    imatrix-runner report model --quantized-by me --repo me/model-GGUF
    """
    from imatrix_runner.cli.console import stdout_console
    from imatrix_runner.cli.report_table import print_report
    from imatrix_runner.journal import Journal
    from imatrix_runner.report.stored import encode_report
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.workflow.context import Context, held
    from imatrix_runner.workflow.report import make_report
    from imatrix_runner.workflow.request import EnvironmentRequest

    if repo and repository_in(repo) is None:
        raise UsageError(f"{repo!r} is not a hub id", "a repository is named ORG/NAME", "For example: --repo me/model-GGUF")
    found, environment = find_workspace(workspace, work_dir), EnvironmentRequest(command=invocation.command)
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        context = Context(listener.sink)
        with stop_on_signals(context.stop), held(found, environment, context, dry_run=False) as runner:
            made = make_report(found, Journal(found.journal), runner, listener.sink, quantized_by=quantized_by, repo=repo)
    if as_json:
        sys.stdout.write(encode_report(made.report).decode())
        sys.stdout.flush()
    elif not options["quiet"]:
        console = stdout_console()
        print_report(made.report, console)
        console.print("\n".join(str(path) for path in made.paths))
    return 0


def find_workspace(name: str, work_dir: Path) -> Workspace:
    """The workspace at a path, or of a model. Raises :class:`InvalidDataError` where no journal lies."""
    for path in (Path(name).expanduser(), work_dir.expanduser() / name):
        if (path / "journal.json").is_file():
            root = path.absolute() if path.name not in ("", "..") else path.resolve()
            return Workspace(root, root.name)
    raise InvalidDataError(
        f"{name} is no workspace",
        f"there is no journal.json in it, nor in {work_dir / name}",
        "See those that are there with: imatrix-runner status; a new one is made by: imatrix-runner run MODEL",
    )
