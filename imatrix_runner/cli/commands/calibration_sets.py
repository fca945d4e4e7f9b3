"""``calibration list`` and ``calibration fetch``: shipped and public calibration texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, option, setting
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import FILE
from imatrix_runner.cli.work import at_work, print_result
from imatrix_runner.untrusted import split_url

if TYPE_CHECKING:
    from rich.console import Console

    from imatrix_runner.calibration.parts import TextPart
    from imatrix_runner.calibration.public.sets import FetchedSet, ListedSet


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    talk: TalkOptions


@command(ListOptions, name="list", examples=("imatrix-runner calibration list", "imatrix-runner calibration list --json"))
def list_command(_invocation: Invocation, options: ListOptions) -> int:
    """List the shipped parts and the public calibration texts; nothing is downloaded."""
    from imatrix_runner.calibration.parts import shipped_parts
    from imatrix_runner.calibration.public.sets import list_sets

    parts, sets = shipped_parts(), list_sets()
    print_result(options.talk, lambda: _list_document(parts, sets), lambda console: _print_tables(parts, sets, console))
    return 0


@dataclass(frozen=True, kw_only=True)
class FetchTextOptions:
    name: str = argument()
    out: Path | None = option(
        "-o", "--output", type=FILE, metavar="FILE", help="Also copy the text there (default: it stays in the cache)."
    )
    force: bool = option("--force", is_flag=True, help="Download it again even if it is in the cache, and replace FILE.")
    offline: bool = setting("--offline", is_flag=True, help="Never use the network: only what was fetched before.")
    talk: TalkOptions


@command(
    FetchTextOptions,
    examples=(
        "imatrix-runner calibration fetch bartowski-v3",
        "imatrix-runner calibration fetch eaddario:combined_en_small -o calibration.txt",
    ),
)
def fetch(_invocation: Invocation, options: FetchTextOptions) -> int:
    """Fetch the public calibration text NAME, or NAME:TEXT, into the cache and print its path.

    NAME is one that `calibration list` shows. It is not part of imatrix-runner and has its own licence.
    """
    from imatrix_runner.calibration.public.sets import copy_set, fetch_set, refuse_taken

    out, force, talk = options.out, options.force, options.talk
    if out is not None:
        out = out.expanduser().absolute()
        refuse_taken(out, force=force)
    with at_work(talk) as work:
        fetched = fetch_set(options.name, work.context, offline=options.offline, force=force)
        if out is not None:
            copy_set(fetched, out, force=force)
        path = out or fetched.path
        if fetched.was_cached:
            work.console.print(f"It was fetched on {fetched.record.date[:10]}; licence: {fetched.licence}.")
        for line in _following(path) if not talk.as_json else ():
            work.console.print(f"  {line}", soft_wrap=True)
    print_result(talk, lambda: _fetch_document(fetched, path), lambda console: console.print(str(path), soft_wrap=True))
    return 0


def _fetch_document(fetched: FetchedSet, path: Path) -> dict[str, Any]:
    import msgspec

    from imatrix_runner.cli.views.json_documents import document

    return document(
        "calibration-fetch",
        exit_code=0,
        path=str(path),
        cached=str(fetched.path),
        was_cached=fetched.was_cached,
        record=msgspec.to_builtins(fetched.record),
        replaced=msgspec.to_builtins(fetched.replaced),
        next=_following(path),
    )


def _following(path: Path) -> list[str]:
    """Commands to type next."""
    import shlex

    named = shlex.quote(str(path))
    return [f"imatrix-runner calibration inspect {named}", f"imatrix-runner run MODEL -f {named}"]


def _list_document(parts: tuple[TextPart, ...], sets: tuple[ListedSet, ...]) -> dict[str, Any]:
    from imatrix_runner.cli.views.json_documents import document

    total = sum(_size(part) for part in parts)
    return document(
        "calibration-list",
        exit_code=0,
        parts=[{"name": part.name, "bytes": _size(part), "share": _size(part) / total} for part in parts],
        sets=[_set_content(listed) for listed in sets],
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


def _print_tables(parts: tuple[TextPart, ...], sets: tuple[ListedSet, ...], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from imatrix_runner.files import human_bytes

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
    console.print(Text("The name shipped stands for all shipped parts. Each of these names is a source for: calibration build"))
    for listed in sets:
        console.print(Text(f"{listed.set.name}: {listed.set.good_for}. {listed.set.origin}"))
    console.print(Text("Fetch one with: imatrix-runner calibration fetch NAME, or NAME:TEXT where a set has several texts."))


def _publisher(origin: str) -> str:
    """Host and owner in an address: ``gist.github.com/bartowski1182``; for a data set of the hub, its repository."""
    parts = split_url(origin)
    where = parts.path.removeprefix("/datasets/").strip("/")
    return where if parts.path.startswith("/datasets/") else f"{parts.hostname}/{where.partition('/')[0]}"


def _size(part: TextPart) -> int:
    return len(part.text.encode())
