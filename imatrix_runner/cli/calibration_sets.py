"""``calibration list`` and ``calibration fetch``: the texts that are shipped, and those that others published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imatrix_runner.cli.options import output_options
from imatrix_runner.cli.render import listening
from imatrix_runner.cli.settings import SettingsCommand, setting
from imatrix_runner.untrusted import split_url

if TYPE_CHECKING:
    from imatrix_runner.calibration.parts import Part
    from imatrix_runner.workflow.calibration_sets import ListedSet


@click.command("list", cls=SettingsCommand)
@output_options
def list_command(**options: Any) -> int:
    """List the shipped parts and the public calibration texts; nothing is downloaded.

    \b
    imatrix-runner calibration list
    imatrix-runner calibration list --json
    """
    from imatrix_runner.calibration.parts import shipped_parts
    from imatrix_runner.workflow.calibration_sets import list_sets

    parts, sets = shipped_parts(), list_sets()
    if options["as_json"]:
        _print_json(parts, sets)
    elif not options["quiet"]:
        _print_tables(parts, sets)
    return 0


@click.command(cls=SettingsCommand)
@click.argument("name")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also copy the text there (default: it stays in the cache).",
)
@click.option("--force", is_flag=True, help="Ask upstream again although it is in the cache, and replace FILE.")
@setting("--offline", is_flag=True, help="Never touch the network: only what was fetched before.")
@output_options
def fetch(name: str, out: Path | None, force: bool, offline: bool, **options: Any) -> int:
    """Fetch the public calibration text NAME, or NAME:TEXT, into the cache and print its path.

    NAME is one that `calibration list` shows. Nothing of it belongs to imatrix-runner: look at its licence.

    \b
    imatrix-runner calibration fetch bartowski-v3
    imatrix-runner calibration fetch eaddario:combined_en_small -o calibration.txt
    """
    import msgspec

    from imatrix_runner.cli.console import stdout_console
    from imatrix_runner.cli.documents import document, print_document
    from imatrix_runner.signals import stop_on_signals
    from imatrix_runner.workflow.calibration_sets import copy_set, fetch_set, refuse_taken
    from imatrix_runner.workflow.context import Context

    out = out.expanduser().absolute() if out is not None else None
    if out is not None:
        refuse_taken(out, force=force)
    with listening(quiet=options["quiet"], verbose=options["verbose"]) as listener:
        context = Context(listener.sink)
        with stop_on_signals(context.stop):
            fetched = fetch_set(name, context, offline=offline, force=force)
            if out is not None:
                copy_set(fetched, out, force=force)
        path = out or fetched.path
        following = _following(path)
        if fetched.was_cached:
            listener.console.print(f"It was fetched on {fetched.record.date[:10]}; licence: {fetched.licence}.")
        for line in following if not options["as_json"] else ():
            listener.console.print(f"  {line}", soft_wrap=True)
    if options["as_json"]:
        print_document(
            document(
                "calibration-fetch",
                exit_code=0,
                path=str(path),
                cached=str(fetched.path),
                was_cached=fetched.was_cached,
                record=msgspec.to_builtins(fetched.record),
                replaced=msgspec.to_builtins(fetched.replaced),
                next=following,
            )
        )
    elif not options["quiet"]:
        stdout_console().print(str(path), soft_wrap=True)
    return 0


def _following(path: Path) -> list[str]:
    """What to type next."""
    import shlex

    named = shlex.quote(str(path))
    return [f"imatrix-runner calibration inspect {named}", f"imatrix-runner run MODEL -f {named}"]


def _print_json(parts: tuple[Part, ...], sets: tuple[ListedSet, ...]) -> None:
    from imatrix_runner.cli.documents import document, print_document

    total = sum(_size(part) for part in parts)
    print_document(
        document(
            "calibration-list",
            exit_code=0,
            parts=[{"name": part.name, "bytes": _size(part), "share": _size(part) / total} for part in parts],
            sets=[_set_content(listed) for listed in sets],
        )
    )


def _set_content(listed: ListedSet) -> dict[str, Any]:
    import msgspec

    chosen = listed.set
    return {
        "name": chosen.name,
        "kind": chosen.kind,
        "size": chosen.size,
        "licence": chosen.licence,
        "origin": chosen.origin,
        "good_for": chosen.good_for,
        "texts": [{"name": chosen.named(text.name), "bytes": text.n_bytes} for text in chosen.texts],
        "more_texts": chosen.open,
        "fetched": [{"path": str(path), **msgspec.to_builtins(record)} for path, record in listed.fetched],
    }


def _print_tables(parts: tuple[Part, ...], sets: tuple[ListedSet, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    from imatrix_runner.cli.console import stdout_console
    from imatrix_runner.files import human_bytes

    console = stdout_console()
    shipped = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Shipped part", "Size", "Share"):
        shipped.add_column(heading, justify="left" if heading == "Shipped part" else "right")
    total = sum(_size(part) for part in parts)
    for part in parts:
        shipped.add_row(Text(part.name), human_bytes(_size(part)), f"{100 * _size(part) / total:.1f} %")
    console.print(shipped)
    console.print()
    public = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Public set", "Kind", "Size", "Licence", "Origin", "Fetched"):
        public.add_column(heading, overflow="fold")
    for listed in sets:
        chosen = listed.set
        names = [record.name.removeprefix(f"{chosen.name}:") for _, record in listed.fetched]
        fetched = "no" if not names else "yes" if len(chosen.texts) == 1 and not chosen.open else ", ".join(names)
        cells = (chosen.name, chosen.kind, chosen.size, chosen.licence, _publisher(chosen.origin), fetched)
        public.add_row(*map(Text, cells))
    console.print(public)
    console.print()
    console.print(Text("All shipped parts together are called shipped. Any of these names is a source for: calibration build"))
    for listed in sets:
        console.print(Text(f"{listed.set.name}: {listed.set.good_for}. {listed.set.origin}"))
    console.print(Text("Fetch one with: imatrix-runner calibration fetch NAME, or NAME:TEXT where a set has several texts."))


def _publisher(origin: str) -> str:
    """Host and owner of an address: ``gist.github.com/bartowski1182``; for the hub its repository."""
    parts = split_url(origin)
    where = parts.path.removeprefix("/datasets/").strip("/")
    return where if parts.path.startswith("/datasets/") else f"{parts.hostname}/{where.partition('/')[0]}"


def _size(part: Part) -> int:
    return len(part.text.encode())
