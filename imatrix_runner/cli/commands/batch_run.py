"""``batch run``: checks a list of models whole, then works through it on a bounded disk."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import ClassVar, Literal

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option, typed
from imatrix_runner.cli.options import MAKE, SpreadingOptions, TalkOptions, WorkDirOptions
from imatrix_runner.cli.requested import cluster_request
from imatrix_runner.cli.types import FILE, SIZE, Duration, Names, WeightCount, complete_place
from imatrix_runner.cli.work import at_work, stay_offline
from imatrix_runner.context.requests import BatchRequest, EnvironmentRequest, WatchRequest
from imatrix_runner.errors import SomeLevelsFailedError, UsageError
from imatrix_runner.events import no_effect, warning
from imatrix_runner.safe_text import shown

DISK = "Disk"
WATCH = "New models"
LEAST_EVERY = 60.0
"""Seconds between two looks at least: a hub limits how often it is asked."""


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    SECTION: ClassVar[str] = WATCH

    watch: tuple[str, ...] = option(
        "--watch",
        multiple=True,
        metavar="ORG|COLLECTION|trending",
        shell_complete=complete_place,
        help="Add what appears there, until Ctrl-C: models of an organisation or user, of a collection, or that trend.",
    )
    watch_every: float = option(
        "--watch-every", type=Duration(LEAST_EVERY), default="30min", show_default=True, help="How often to look."
    )
    watch_for: float | None = option(
        "--watch-for",
        type=Duration(),
        help="End when everything is done after this time; 0s looks once (default: watch until Ctrl-C).",
    )
    watch_most: int = option(
        "--watch-most",
        type=click.IntRange(1, 100),
        default=5,
        show_default=True,
        metavar="N",
        help="Models that one look adds at most.",
    )
    watch_size: int | None = option(
        "--watch-size", type=WeightCount(), help="Only models of at most this many weights, such as 32B."
    )
    watch_architecture: tuple[str, ...] = option(
        "--watch-architecture",
        type=Names(),
        default=(),
        metavar="A,B,…",
        help="Only models that announce one of these architectures.",
    )
    watch_licence: tuple[str, ...] = option(
        "--watch-licence",
        type=Names(),
        default=(),
        metavar="A,B,…",
        help="Only models under one of these licences, such as apache-2.0.",
    )
    watch_since: str = option(
        "--watch-since",
        default="",
        metavar="YYYY-MM-DD",
        help="Only models created on that day or later, those of an organisation that are there already included.",
    )


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
    watching: WatchOptions
    spreading: SpreadingOptions
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
        "imatrix-runner batch run models.yaml --watch org --watch trending --watch-size 32B",
        "imatrix-runner batch run models.yaml --cluster auto",
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
    from imatrix_runner.cli.views.batch_tables import print_batch, print_batch_plan, print_failures_of_batch, print_looks
    from imatrix_runner.cli.views.console import stderr_console, stdout_console
    from imatrix_runner.cli.views.json_documents import print_document

    cluster = cluster_request(options.spreading)
    environment = EnvironmentRequest(options.place.work_dir, command=invocation.command, cluster=cluster)
    request = BatchRequest(
        options.file,
        environment,
        options.keep,
        options.max_disk,
        options.notify,
        options.trust_remote_code,
        watch_request(options.watching, offline=options.offline),
    )
    reader = EntryReader(known_options(), request_of)
    with at_work(options.talk) as work:
        if request.watch is None and (unused := typed(options.watching, *(each.name for each in fields(WatchOptions)))):
            work.context.sink(warning(no_effect(unused, "nothing is watched without --watch.")))
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
        print_looks(result.looks, stdout_console())
    elif options.talk.quiet:
        print_failures_of_batch(result.view, stderr_console())
    else:
        print_batch(result.view, stdout_console())
    return code


def watch_request(options: WatchOptions, *, offline: bool) -> WatchRequest | None:
    """The request to watch; None without ``--watch``. Raises :class:`UsageError`."""
    if not options.watch:
        return None
    from imatrix_runner.models.hub import parse_place

    if offline:
        raise UsageError("--watch and --offline exclude each other", "new models are looked for on the hub", "Leave one out.")
    try:
        valid = not options.watch_since or date.fromisoformat(options.watch_since).isoformat() == options.watch_since
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(
            f"Invalid --watch-since {shown(options.watch_since)!r}", "it takes a day", "For example: --watch-since 2026-01-31"
        )
    return WatchRequest(
        tuple(dict.fromkeys(map(parse_place, options.watch))),
        options.watch_every,
        options.watch_for,
        options.watch_most,
        options.watch_size,
        options.watch_architecture,
        options.watch_licence,
        options.watch_since,
    )
