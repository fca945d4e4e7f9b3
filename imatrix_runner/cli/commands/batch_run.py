"""``batch run``: checks a list of models whole, then works through it on a bounded disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option
from imatrix_runner.cli.options import MAKE, TalkOptions, WorkDirOptions
from imatrix_runner.cli.types import FILE, SIZE
from imatrix_runner.cli.work import at_work, stay_offline
from imatrix_runner.context.requests import BatchRequest, EnvironmentRequest
from imatrix_runner.errors import SomeLevelsFailedError

DISK = "Disk"


@dataclass(frozen=True, kw_only=True)
class BatchRunOptions:
    file: Path = argument(type=FILE)
    place: WorkDirOptions
    dry_run: bool = option("--dry-run", is_flag=True, section=MAKE, help="Check the list and print the plan; write nothing.")
    keep: Literal["all", "levels", "nothing"] = option(
        "--keep",
        type=click.Choice(["all", "levels", "nothing"]),
        default="all",
        show_default=True,
        section=DISK,
        help="What stays: all; only levels; or nothing, each level being removed once it is published and verified.",
    )
    max_disk: int | None = option(
        "--max-disk",
        type=SIZE,
        section=DISK,
        help="Most space for downloads, sources and levels together (default: what is free).",
    )
    trust_remote_code: bool = option(
        "--trust-remote-code", is_flag=True, section="Source", help="Allow the converter to run Python code of every model."
    )
    offline: bool = option("--offline", is_flag=True, section="Source", help="Never use the network.")
    notify: tuple[str, ...] = option(
        "--notify", multiple=True, metavar="URL", section="Talk", help="Address to notify of ends and failures (Apprise)."
    )
    talk: TalkOptions


@command(
    BatchRunOptions,
    name="run",
    examples=(
        "imatrix-runner batch run models.yaml --dry-run",
        "imatrix-runner batch run models.yaml --keep nothing --max-disk 500GiB",
        "imatrix-runner batch run models.yaml --notify ntfy://my-topic",
    ),
)
def run_command(invocation: Invocation, options: BatchRunOptions) -> int:
    """Take every model of the list FILE through run, and publish it where the list says so.

    FILE is YAML or JSON lines. The list is checked before anything is fetched. A model that fails does not stop the others;
    the same command continues, and tries those that failed again.
    """
    stay_offline(options.offline)
    from imatrix_runner.app.batch import BatchPlan, EntryReader, run_batch
    from imatrix_runner.batch.batch_page import write_page
    from imatrix_runner.batch.notices import Notifier
    from imatrix_runner.cli.commands.batch_entries import known_options, request_of
    from imatrix_runner.cli.views.batch_documents import batch_document
    from imatrix_runner.cli.views.batch_tables import print_batch, print_batch_plan, print_failures_of_batch
    from imatrix_runner.cli.views.console import stderr_console, stdout_console
    from imatrix_runner.cli.views.json_documents import print_document

    environment = EnvironmentRequest(options.place.work_dir, command=invocation.command)
    request = BatchRequest(
        options.file,
        environment,
        options.keep,
        options.max_disk,
        options.notify,
        options.trust_remote_code,
    )
    reader = EntryReader(known_options(), request_of)
    with at_work(options.talk) as work:
        notifier = Notifier(request.notify, work.context.sink)

        def show(plan: BatchPlan) -> None:
            if not options.dry_run:
                print_batch_plan(plan, work.console)

        result = run_batch(
            request,
            reader,
            work.context,
            dry_run=options.dry_run,
            on_plan=show,
            on_view=lambda view, folder: write_page(view, folder.page, work.context.sink),
            notify=notifier.send,
        )
        if result.view is not None:
            notifier.end(result.view)
    code = SomeLevelsFailedError.exit_code if result.failed else 0
    if options.talk.as_json:
        print_document(batch_document(result, code))
    elif result.view is None:
        print_batch_plan(result.plan, stdout_console())
    elif options.talk.quiet:
        print_failures_of_batch(result.view, stderr_console())
    else:
        print_batch(result.view, stdout_console())
    return code
