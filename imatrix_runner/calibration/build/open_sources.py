"""Opens the sources of a calibration text: files and folders, stdin, shipped parts, public sets, data sets of a hub."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

from imatrix_runner.calibration.build.build_text import OpenedSource
from imatrix_runner.calibration.parts import TextPart, part_records, shipped_parts
from imatrix_runner.calibration.public.catalogue import set_names
from imatrix_runner.calibration.public.sets import fetch_set
from imatrix_runner.context.context import Context
from imatrix_runner.documents.conversations import Unfit, content_of
from imatrix_runner.documents.documents import BadRecord, Conversation, DocumentRecord
from imatrix_runner.documents.records import read_source, source_bytes, source_files, spool_stdin
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.events import detail, info
from imatrix_runner.files import sha256
from imatrix_runner.models.hub import Hub, fetch_dataset, is_offline, parse_dataset
from imatrix_runner.safe_text import printable

NOT_STATED = "not stated"

SHIPPED_LICENCE = "MIT or CC0-1.0"


@dataclass
class SourceOpener:
    """Opens the sources that users name. ``field_name`` is the one field to take of every record; empty: all known forms.

    ``scratch`` is a folder for spooled stdin, which cannot be read twice. ``paths`` collects the user's files and folders.
    """

    context: Context
    scratch: Path
    field_name: str
    offline: bool
    paths: list[Path] = field(default_factory=list)

    def open(self, argument: str) -> OpenedSource:
        """Open the source that ``SOURCE[=WEIGHT]`` names. Raises :class:`RunnerError`."""
        parts = shipped_parts()
        wanted = parse_source(argument, [part.name for part in parts], set_names())
        if wanted.kind == "part":
            return _shipped(wanted, [part for part in parts if wanted.text in (part.name, ALL_PARTS)])
        return self._open(wanted)

    def _open(self, wanted: WantedSource) -> OpenedSource:
        if wanted.kind == "stdin":
            return self._stdin(wanted)
        if wanted.kind == "set":
            fetched = fetch_set(wanted.text, self.context, offline=self.offline)
            return self._files(wanted, "public set", [fetched.path], licence=fetched.licence, revision=fetched.origin)
        if wanted.kind == "hub":
            asked = parse_dataset(wanted.text)
            assert asked is not None
            found = fetch_dataset(Hub(self.context.stop, self.context.sink, offline=self.offline or is_offline()), asked)
            licence = found.licence or NOT_STATED
            return self._files(wanted, "data set", list(found.paths), licence=licence, revision=found.origin)
        self.paths.append(wanted.path)
        return self._files(wanted, "folder" if wanted.path.is_dir() else "file", [wanted.path], name=_last_name(wanted.path))

    def _stdin(self, wanted: WantedSource) -> OpenedSource:
        if any(path.parent == self.scratch for path in self.paths):
            raise UsageError("- is given twice", "stdin can be read only once", "Give - once.")
        spooled = spool_stdin(sys.stdin.buffer, self.scratch, lambda _: self.context.stop.check())
        self.paths.append(spooled)
        return self._files(wanted, "stdin", [spooled], name="stdin")

    def _files(
        self,
        wanted: WantedSource,
        kind: str,
        paths: list[Path],
        *,
        licence: str = NOT_STATED,
        revision: str = "",
        name: str = "",
    ) -> OpenedSource:
        name = printable(name or wanted.text)
        records = partial(_read, paths, name, self.field_name, self._report_skipped)
        n_bytes = sum(source_bytes(path) or 0 for path in paths)
        digest = _digest(paths, self.context.stop.check)
        return OpenedSource(name, kind, licence, digest, n_bytes, records, wanted.weight, revision)

    def _report_skipped(self, name: str, skipped: Sequence[tuple[Path, str]]) -> None:
        counts = Counter(why for _, why in skipped)
        summary = ", ".join(f"{count} {why}" for why, count in counts.most_common())
        self.context.sink(info(f"{name}: skipped {summary}"))
        for path, why in skipped:
            self.context.sink(detail(f"{printable(str(path))}: skipped, {why}"))


def _shipped(wanted: WantedSource, parts: Sequence[TextPart]) -> OpenedSource:
    """One part of the shipped text, or all of them."""
    text = "".join(part.text for part in parts).encode()

    def records(on_bytes: Callable[[int], None]) -> Iterator[DocumentRecord | BadRecord]:
        for part in parts:
            on_bytes(len(part.text.encode()))
            yield from part_records(part.name)

    digest = hashlib.sha256(text).hexdigest()
    return OpenedSource(wanted.text, "shipped text", SHIPPED_LICENCE, digest, len(text), records, wanted.weight)


def _read(
    paths: Sequence[Path],
    name: str,
    field_name: str,
    report_skipped: Callable[[str, Sequence[tuple[Path, str]]], None],
    on_bytes: Callable[[int], None],
) -> Iterator[DocumentRecord | BadRecord]:
    skipped: list[tuple[Path, str]] = []

    def interpret(row: Mapping[str, Any]) -> str | Conversation | Unfit:
        return content_of(row, field_name)

    for path in paths:
        shown = name if len(paths) == 1 else f"{name}, {path.name}"
        yield from read_source(
            path, interpret, on_bytes=on_bytes, on_skipped=lambda file, why: skipped.append((file, why)), name=shown
        )
    if skipped:
        report_skipped(name, skipped)


def _last_name(path: Path) -> str:
    """A user's path as a manifest names it: without its folders, which may be private."""
    return path.name or path.resolve().name or str(path)


def _digest(paths: Sequence[Path], check: Callable[[], None]) -> str:
    """The SHA-256 of one file; for a folder or several files, the SHA-256 of their names and hashes."""
    if len(paths) == 1 and not paths[0].is_dir():
        return sha256(paths[0], lambda _: check())
    digest = hashlib.sha256()
    for path in paths:
        for file in source_files(path):
            inside = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digest.update(f"{inside}\0{sha256(file, lambda _: check())}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


Kind = Literal["path", "stdin", "part", "set", "hub"]

ALL_PARTS = "shipped"
"""Names the whole shipped text."""


@dataclass(frozen=True)
class WantedSource:
    """A source as the user named it: ``SOURCE[=WEIGHT]``. ``weight`` is None if none was given."""

    text: str
    kind: Kind
    weight: float | None = None

    @property
    def path(self) -> Path:
        return Path(self.text).expanduser()


def parse_source(argument: str, parts: Collection[str], sets: Collection[str]) -> WantedSource:
    """Parse ``SOURCE[=WEIGHT]``: ``-``, else an existing path, a shipped part, a public set, a hub's data set, in this order.

    ``parts`` and ``sets`` are the known names. Raises :class:`UsageError` or :class:`InvalidDataError`.
    """
    text, weight = _split(argument)
    return WantedSource(text, _kind(text, parts, sets), weight)


def _split(argument: str) -> tuple[str, float | None]:
    if Path(argument).expanduser().exists():
        return argument, None  # a file name may contain an equals sign
    text, equals, number = argument.rpartition("=")
    if not equals or not text:
        return argument, None
    try:
        weight = float(number)
    except ValueError:
        return argument, None
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(
            f"Invalid weight in {argument!r}", f"{number} is not a number above 0", "For example: medical.jsonl=3 shipped=1"
        )
    return text, weight


def _kind(text: str, parts: Collection[str], sets: Collection[str]) -> Kind:
    if text == "-":
        return "stdin"
    if text and Path(text).expanduser().exists():
        return "path"
    if text == ALL_PARTS or text in parts:
        return "part"
    if text.partition(":")[0] in sets:
        return "set"
    if parse_dataset(text) is not None:
        return "hub"
    near = get_close_matches(text, [*parts, *sets, ALL_PARTS, *_siblings(text)], n=1, cutoff=0.6)
    raise InvalidDataError(
        f"No source {text!r} found",
        "it is not a file or folder, a shipped part, a public set or the name of a data set on a hub"
        + (f"; did you mean {near[0]}?" if near else ""),
        "Give a path, - for stdin, org/name[:config[:split]], or a name that is listed by: imatrix-runner calibration list",
    )


def _siblings(text: str) -> list[str]:
    """Paths in the same folder as the one that was named."""
    folder = Path(text).expanduser().parent
    if not folder.is_dir():
        return []
    return [str(Path(text).parent / entry.name) if "/" in text else entry.name for entry in folder.iterdir()]
