"""What all commands share: they show events, can be stopped, and end with a document, tables or no output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imatrix_runner.cli.options import TalkOptions

if TYPE_CHECKING:
    from rich.console import Console

    from imatrix_runner.context.context import Context


@dataclass(frozen=True)
class RunningCommand:
    """What a running command uses. ``console``: for other output (a plan) on the same stream as the events."""

    context: Context
    console: Console


@contextmanager
def at_work(talk: TalkOptions) -> Iterator[RunningCommand]:
    """Run a command's work: events are shown as ``talk`` requests, and signals stop it."""
    from imatrix_runner.cli.views.progress import listening
    from imatrix_runner.context.context import Context
    from imatrix_runner.signals import stop_on_signals

    with listening(quiet=talk.quiet, verbose=talk.verbose) as listener:
        context = Context(listener.sink)
        with stop_on_signals(context.stop):
            yield RunningCommand(context, listener.console)


def print_result(talk: TalkOptions, document: Callable[[], dict[str, Any]], tables: Callable[[Console], None]) -> None:
    """Print the result on stdout: the document with ``--json``, nothing with ``-q``, else the tables."""
    from imatrix_runner.cli.views.console import stdout_console
    from imatrix_runner.cli.views.json_documents import print_document

    if talk.as_json:
        print_document(document())
    elif not talk.quiet:
        tables(stdout_console())


def stay_offline(offline: bool) -> None:
    """Keep huggingface_hub off the network. It reads the variable once, on import, so call this before work begins."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
