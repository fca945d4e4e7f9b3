"""``batch status``: how far a batch is, while it runs or afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FILE


@dataclass(frozen=True, kw_only=True)
class BatchStatusOptions:
    file: Path = argument(type=FILE)
    talk: TalkOptions


@command(BatchStatusOptions, name="status")
def status_command(_invocation: Invocation, options: BatchStatusOptions) -> int:
    """Show every model of the list FILE: stages, levels, failures, and the command that continues."""
    from imatrix_runner.app.batch import EntryReader, batch_status
    from imatrix_runner.cli.commands.batch_entries import known_options, request_of
    from imatrix_runner.cli.views.batch_documents import view_document
    from imatrix_runner.cli.views.batch_tables import print_batch
    from imatrix_runner.cli.work import print_result

    reader = EntryReader(known_options(), request_of)
    view = batch_status(options.file, reader)
    print_result(options.talk, lambda: view_document("batch-status", view), lambda console: print_batch(view, console))
    return 0
