"""``batch add``: appends models to a list that may be worked on at the moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FILE
from imatrix_runner.engines.levels import PRESETS
from imatrix_runner.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BatchAddOptions:
    file: Path = argument(type=FILE)
    models: tuple[str, ...] = argument(nargs=-1, required=True, metavar="MODEL...")
    levels: str = option("--levels", default="", metavar="A,B,…", help="Levels to make (default: the list's).")
    preset: str | None = option("--preset", type=click.Choice(PRESETS), help="A publisher's set of levels.")
    publish: str = option("--publish", default="", metavar="ORG[/NAME]", help="Repository to publish to; {model} is allowed.")
    private: bool = option("--private", is_flag=True, help="Make the repository private.")
    priority: int = option("--priority", default=0, show_default=True, help="Higher is first.")
    further: tuple[str, ...] = option(
        "--set", multiple=True, metavar="KEY=VALUE", help="Any other key of a list, for example evaluate=true."
    )
    talk: TalkOptions


@command(
    BatchAddOptions,
    examples=(
        "imatrix-runner batch add models.yaml org/name",
        "imatrix-runner batch add models.yaml org/name --preset bartowski --publish my-org --set evaluate=true",
    ),
)
def add(_invocation: Invocation, options: BatchAddOptions) -> int:
    """Append models to the list FILE, which may be worked on at the moment.

    The list itself is not changed: additions go to FILE.batch/added.jsonl. Its defaults apply to them.
    """
    from imatrix_runner.app.batch import EntryReader, add_to_batch
    from imatrix_runner.cli.commands.batch_entries import known_options, request_of
    from imatrix_runner.cli.views.batch_documents import added_document
    from imatrix_runner.cli.work import print_result

    reader = EntryReader(known_options(), request_of)
    entries = [{"model": model, **_keys(options)} for model in options.models]
    found = add_to_batch(options.file, entries, reader)
    names = ", ".join(entry.model for entry in found)
    print_result(
        options.talk,
        lambda: added_document(found),
        lambda console: console.print(f"Added to {options.file}: {names}."),
    )
    return 0


def _keys(options: BatchAddOptions) -> dict[str, Any]:
    """The keys of an entry that were given."""
    keys: dict[str, Any] = {}
    for pair in options.further:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise UsageError(f"Invalid --set {pair!r}", "it takes KEY=VALUE", "For example: --set evaluate=true")
        keys[key] = value
    given = {"levels": options.levels, "preset": options.preset, "publish": options.publish}
    keys |= {name: value for name, value in given.items() if value}
    keys |= {"private": True} if options.private else {}
    keys |= {"priority": options.priority} if options.priority else {}
    return keys
